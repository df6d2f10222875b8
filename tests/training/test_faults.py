"""Faults of a run: kills, signals, hanging steps, non-finite losses, lost workers and failing trackers."""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import debug_launcher
from accelerate.tracking import GeneralTracker

import runs
from diffusers_prx.training.checkpoints import find_checkpoint, read_run_file, step_of
from diffusers_prx.training.folder_lock import LOCK_FILE, FolderLock
from diffusers_prx.training.non_finite import MAX_SKIPPED_IN_A_ROW
from diffusers_prx.training.run import Run
from diffusers_prx.training.trainer import train
from diffusers_prx.training.watchdog import EXIT_HUNG, EXIT_PREEMPTED, Watchdog

STEPS = 6
SMALL = {"max_train_steps": STEPS, "checkpointing_steps": 1, "use_ema": True, "ema_update_every": 1}


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored():
    """A shell that starts the tests in the background ignores SIGINT for them, and a run keeps that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    return runs.save_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text_encoder) -> Run:
    return runs.train(runs.settings(tmp_path_factory.mktemp("undisturbed"), text_encoder, **SMALL))


def at_step(run: Run, step: int, act) -> None:
    """Call `act` in the middle of a step; its result, if any, replaces the transformer's."""

    def hook(module, args, output):
        return act(output) if run.state.step == step else None

    run.nets.transformer.register_forward_hook(hook)


def break_second_sample(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    factor = torch.ones(len(output[0]), 1, 1, 1)
    factor[1] = torch.nan
    return (output[0] * factor, *output[1:])


# Non-finite losses


def test_non_finite_step_is_skipped_and_recorded(undisturbed, tmp_path, capsys):
    run = runs.start(undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path), "non_finite": "skip"})
    at_step(run, 2, break_second_sample)
    train(run)
    assert run.state.step == STEPS
    assert run.state.skipped_steps == 1
    assert [entry["step"] for entry in run.state.history] == [1, 2, 4, 5, 6]
    assert "not finite at step 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "training.json").read_text())["skipped_steps"] == 1
    assert all("grad_norm" in entry for entry in run.state.history)
    before, after = (runs.saved_weights(tmp_path / f"checkpoint-{step}", "transformer") for step in (2, 3))
    runs.assert_same(before, after)
    record = json.loads((tmp_path / "non_finite" / "step-0000002.json").read_text())
    assert (record["step"], record["grad_norm"]) == (2, "nan")
    samples = record["samples"]
    assert [sample["sample_index"] for sample in samples] == [8, 9, 10, 11]
    assert [sample["loss"] == "nan" for sample in samples] == [False, True, False, False]
    for sample in samples:
        assert next(iter(run.stages[0].source.captions(sample["dataset_index"]).values())) == sample["caption"]


def test_non_finite_step_stops_the_run(undisturbed, tmp_path):
    run = runs.start(undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path)})
    at_step(run, 2, break_second_sample)
    with pytest.raises(ValueError, match=r"step 2 .*step-0000002.json.*`learning_rate`"):
        train(run)
    assert (tmp_path / "non_finite" / "step-0000002.json").is_file()
    run.writer.wait()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"


def test_many_non_finite_steps_in_a_row_stop_the_run(tmp_path, text_encoder):
    changes = {"learning_rate": 1e30, "lr_warmup_steps": 0, "max_train_steps": 99, "checkpointing_steps": 100}
    run = runs.start(runs.settings(tmp_path, text_encoder, **changes, non_finite="skip"))
    with pytest.raises(ValueError, match=f"{MAX_SKIPPED_IN_A_ROW + 1} such steps in a row"):
        train(run)


def break_one_of_two(values: dict) -> None:
    torch.set_num_threads(1)
    run = runs.start(values)
    if run.accelerator.process_index == 1:
        at_step(run, 1, break_second_sample)
    train(run)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_non_finite_step_of_one_process_is_skipped_by_all(undisturbed, tmp_path, sharding):
    changes = {"output_dir": str(tmp_path), "non_finite": "skip", "train_batch_size": 2, "sharding": sharding}
    debug_launcher(break_one_of_two, (undisturbed.cfg.to_dict() | changes | {"max_train_steps": 3},), num_processes=2)
    record = json.loads((tmp_path / "non_finite" / "step-0000001.json").read_text())
    assert [(sample["rank"], sample["sample_index"]) for sample in record["samples"]] == [
        (0, 4),
        (0, 5),
        (1, 6),
        (1, 7),
    ]
    assert [sample["loss"] == "nan" for sample in record["samples"]] == [False, False, False, True]
    assert json.loads((tmp_path / "training.json").read_text())["skipped_steps"] == 1


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_run_stopped_by_a_signal_resumes_bitwise(undisturbed, tmp_path, number):
    values = undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path), "checkpointing_steps": 100}
    run = runs.start(values)
    at_step(run, 2, lambda output: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        train(run)
    assert end.value.code == EXIT_PREEMPTED
    assert signal.getsignal(number) == before
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-3"  # the step was finished
    assert json.loads((tmp_path / "preempted.json").read_text()) == {"signal": signal.Signals(number).name, "step": 3}
    runs.train(values | {"resume_from_checkpoint": "latest"})
    assert not (tmp_path / "preempted.json").exists()
    runs.assert_same(
        *(runs.saved_state(folder / f"checkpoint-{STEPS}") for folder in (undisturbed.output_dir, tmp_path))
    )


def test_second_ctrl_c_ends_immediately():
    process = mp.get_context("fork").Process(target=steps_under_watch, args=([30.0], 60.0))
    process.start()
    time.sleep(0.5)
    for _ in range(2):
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        process.join(0.5)
    process.join(5)
    assert process.exitcode == -signal.SIGINT


def test_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Watchdog(0, 60) as watchdog:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert watchdog.received == 0
    finally:
        signal.signal(signal.SIGINT, before)


def signal_some_of_two(values: dict, number: int, ranks: list[int]) -> None:
    torch.set_num_threads(1)
    run = runs.start(values)
    rank = run.accelerator.process_index
    if rank in ranks:
        at_step(run, 1, lambda output: os.kill(os.getpid(), number))
    try:
        train(run)
    except SystemExit as end:
        (run.output_dir / f"code-{rank}").write_text(str(end.code))


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGUSR1, [1]), (signal.SIGINT, [0, 1])])
def test_signal_stops_all_processes_at_the_same_step(undisturbed, tmp_path, number, ranks):
    """A signal to one process, and the Ctrl-C of a terminal, which all receive."""
    values = undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path), "train_batch_size": 2, "sharding": "full"}
    debug_launcher(signal_some_of_two, (values | {"checkpointing_steps": 100}, number, ranks), num_processes=2)
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == [str(EXIT_PREEMPTED)] * 2
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"


# One run per folder


def test_second_run_in_a_folder_is_rejected(undisturbed, tmp_path):
    values = undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path), "max_train_steps": 1}
    run = runs.start(values)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=rf"`output_dir` .* in use .*{holder}"):
        runs.start(values, in_a_new_process=False)
    with pytest.raises(SystemExit) as end:  # a dry run writes nothing and needs no lock
        runs.start(values | {"dry_run": True}, in_a_new_process=False)
    assert end.value.code == 0
    assert (tmp_path / LOCK_FILE).read_text().startswith(holder)
    train(run)
    assert not (tmp_path / LOCK_FILE).exists()


def test_failed_run_releases_its_folder(undisturbed, tmp_path):
    values = undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path), "max_train_steps": 1}
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        runs.start(values | {"resume_from_checkpoint": "checkpoint-9"})
    run = runs.start(values)
    at_step(run, 0, break_second_sample)
    with pytest.raises(ValueError, match="not finite"):
        train(run)
    assert not (tmp_path / LOCK_FILE).exists()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("name", ["file", "file/below", "link"])
def test_output_dir_that_cannot_be_created_is_rejected(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(ValueError, match="`output_dir`"):
        FolderLock(tmp_path / name)


def hold(folder: Path, told) -> None:
    lock = FolderLock(folder)
    worker = mp.get_context("fork").Process(target=time.sleep, args=(60,), daemon=False)
    worker.start()
    told.send(worker.pid)
    time.sleep(60)
    lock.release()


def test_lock_of_a_killed_run_is_free_despite_live_workers(tmp_path):
    told, teller = mp.get_context("fork").Pipe(duplex=False)
    process = mp.get_context("fork").Process(target=hold, args=(tmp_path, teller))
    process.start()
    worker = told.recv()
    with pytest.raises(ValueError, match=f"in use .*process {process.pid} on"):
        FolderLock(tmp_path)
    process.kill()
    process.join()
    os.kill(worker, 0)  # it is still there
    lock = FolderLock(tmp_path)
    os.kill(worker, signal.SIGKILL)
    assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == []


# Kills and hangs: processes that are started as torchrun starts them


def start_on_a_rank(rank: int, world: int, port: int, act, values: dict) -> None:
    output = os.open(f"{values['output_dir']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    run = runs.start(values)
    if act is not None:
        act(run)
    train(run)


def launch(values: dict, act=None, world: int = 2) -> list:
    """Start the processes of a run by forking, which saves the imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world, port, act, values)
    return mp.start_processes(start_on_a_rank, arguments, nprocs=world, join=False, start_method="fork").processes


def hang_on_rank_1(run: Run) -> None:
    if run.accelerator.process_index == 1:
        at_step(run, 1, lambda output: time.sleep(1000))


def steps_under_watch(steps: list[float], limit: float) -> None:
    with Watchdog(0, limit) as watchdog:
        for seconds in steps:
            watchdog.begin_step()
            for _ in range(round(seconds / 0.05)):  # a sleep that the stop falls into would be over at its end
                time.sleep(0.05)


@pytest.mark.parametrize(("stopped", "steps", "code"), [(4.0, [0.8] * 5, 0), (0.0, [0.2, 4.0], EXIT_HUNG)])
def test_suspended_time_does_not_count(stopped, steps, code):
    """A process suspended for twice the limit goes on; a step that takes longer ends it."""
    process = mp.get_context("fork").Process(target=steps_under_watch, args=(steps, 2.0))
    process.start()
    time.sleep(0.5)
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(stopped)
        os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    assert process.exitcode == code


def fail_after_the_limit() -> None:
    with Watchdog(0, 1.0):
        time.sleep(1.5)
        raise RuntimeError("a collective timed out")


def test_error_after_the_limit_keeps_the_exit_code():
    """A collective may time out while the watchdog waits for the stack traces of other processes."""
    process = mp.get_context("fork").Process(target=fail_after_the_limit)
    process.start()
    process.join(30)
    assert process.exitcode == EXIT_HUNG


def test_hanging_process_ends_the_run_with_all_stack_traces(undisturbed, tmp_path):
    values = undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path / "run"), "train_batch_size": 2}
    processes = launch(values | {"step_timeout_seconds": 12}, hang_on_rank_1)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [EXIT_HUNG] * 2
    for rank, where in enumerate(("maximum", "in <lambda>")):  # one waits for the answer that the other does not give
        written = (tmp_path / f"run-{rank}.log").read_text()
        stacks = written[written.index(f"\nrank {rank} (process {processes[rank].pid} on ") :]
        assert "exceeded 12 s" in stacks
        assert "in micro_step" in stacks or "in optimizer_step" in stacks
        assert rank == 0 or where in stacks


def is_refused(folder: Path, holder: int) -> bool:
    """True if a run has locked the folder and written its process into the lock file."""
    try:
        FolderLock(folder).release()
    except ValueError as error:
        return f"process {holder} on" in str(error)
    return False


def kill_and_resume(values: dict, kills: int, seconds: float, seed: int) -> tuple[list[str], int]:
    """Kill a run of two processes at random moments, every second time while a checkpoint is being written, and start
    it again each time; in the end let it finish. Before each kill another run is refused, after it one is not. Returns
    what was done, and how often another was refused.

    Args:
        values: settings of the run.
        kills: how many.
        seconds: a step takes about so long.
        seed: of the moments.
    """
    chance, folder, told, refused = random.Random(seed), Path(values["output_dir"]), [], 0
    for number in range(kills):
        began, processes = time.monotonic(), launch(values)
        if number % 2:
            for _ in range(chance.randint(1, 3)):  # the first that is written, or a later one
                wait_for(lambda: not list(folder.glob("*.unfinished")), processes)
                wait_for(lambda: list(folder.glob("*.unfinished")), processes)
            time.sleep(chance.uniform(0, 0.02))
        else:  # in the start, or some steps later
            start = newest_step(folder)
            later = start + chance.randint(0, 3)
            wait_for(lambda: newest_step(folder) >= later, processes)  # noqa: B023
            time.sleep(chance.uniform(0, 2 * seconds))
        alive = [process for process in processes if process.is_alive()]
        refused += is_refused(folder, processes[0].pid)
        chance.shuffle(alive)
        for process in alive:  # the launcher kills the others when one is gone
            process.kill()
            process.join()
            time.sleep(chance.choice((0, 0.1)))
        FolderLock(folder).release()  # the system has given it back
        newest = find_checkpoint(folder, "latest")
        unfinished = [path.name for path in folder.glob("*.unfinished")]
        told.append(
            f"kill {number}: {len(alive)} processes after {time.monotonic() - began:.2f} s, newest "
            f"{newest and newest.name}, unfinished {unfinished}"
        )
        print(told[-1], flush=True)
    processes = launch(values)
    for process in processes:
        process.join()
        assert process.exitcode == 0, Path(f"{folder}-0.log").read_text()[-3000:]
    return told, refused


def newest_step(folder: Path) -> int:
    newest = find_checkpoint(folder, "latest")
    return 0 if newest is None else step_of(newest)


def wait_for(condition, processes: list) -> None:
    while not condition() and all(process.is_alive() for process in processes):
        time.sleep(0.001)


def check_kills(text_encoder: Path, tmp_path: Path, steps: int, kills: int, capsys) -> None:
    changes = {
        "optimizer": "muon", "use_ema": True, "ema_update_every": 1, "max_train_steps": steps, "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest", "sharding": "full",
    }  # fmt: skip
    values = runs.settings(tmp_path / "undisturbed", text_encoder, **changes)
    began = time.monotonic()
    for process in launch(values):
        process.join()
        assert process.exitcode == 0
    seconds = time.monotonic() - began
    with capsys.disabled():  # it takes minutes
        print(f"\n{steps} steps undisturbed: {seconds:.1f} s")
        killed = values | {"output_dir": str(tmp_path / "killed")}
        told, refused = kill_and_resume(killed, kills, seconds / steps, seed=kills)
    one, other = (runs.saved_state(tmp_path / name / f"checkpoint-{steps}") for name in ("undisturbed", "killed"))
    state = read_run_file(tmp_path / "killed" / f"checkpoint-{steps}")["state"]
    assert [entry["step"] for entry in state["history"]] == list(range(1, steps + 1))  # nothing lost, nothing twice
    assert state["samples_read"] == 4 * steps
    runs.assert_same(other, one)
    writing = sum("unfinished ['" in line for line in told)
    with capsys.disabled():
        print(f"{kills} kills, {writing} of them while a checkpoint was written: the same to the last bit")
        print(f"before {refused} of them a second run was refused, after each the folder was free")
    assert writing >= kills // 5
    assert refused >= kills // 2
    left = {path.suffix for path in (tmp_path / "killed").iterdir()} & {".unfinished", ".removed", ".lock"}
    assert not left


def test_random_kills_do_not_change_the_result(text_encoder, tmp_path, capsys):
    check_kills(text_encoder, tmp_path, steps=8, kills=2, capsys=capsys)


@pytest.mark.slow
def test_hundred_random_kills_do_not_change_the_result(text_encoder, tmp_path, capsys):
    check_kills(text_encoder, tmp_path, steps=250, kills=100, capsys=capsys)


# Damage of what is stored


def damage_and_resume(undisturbed: Run, folder: Path, places: int, ends: int, caplog) -> None:
    """Turn over single bits of the newest checkpoint, one at a time. Each time the run has to start from the one
    before, with a warning that names the file, and a run that asks for the damaged checkpoint is refused; some of the
    runs go on to the end, which has to be the undisturbed one's."""
    chance, newest = random.Random(places), folder / f"checkpoint-{STEPS - 1}"
    for step in (STEPS - 2, STEPS - 1):
        runs.copy_checkpoint(undisturbed, step, folder)
    files = sorted(newest.iterdir())
    finished = runs.saved_state(undisturbed.output_dir / f"checkpoint-{STEPS}")
    for number in range(places):
        # half of them by size, which are in the tensors; half in any file, complete.json too
        weights = [file.stat().st_size if number % 2 else 1 for file in files]
        file = chance.choices(files, weights)[0]
        place, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        before = file.read_bytes()
        damaged = bytearray(before)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        caplog.clear()
        assert find_checkpoint(folder, "latest").name == f"checkpoint-{STEPS - 2}", (file, place, bit)
        assert file.name in caplog.text
        with pytest.raises(ValueError, match=file.name):
            find_checkpoint(folder, newest.name)
        if number % (places // ends) == 0:
            again = shutil.copytree(folder, folder.with_name(f"end-{number}"))
            values = undisturbed.cfg.to_dict() | {"output_dir": str(again), "resume_from_checkpoint": "latest"}
            runs.train(values)
            runs.assert_same(runs.saved_state(again / f"checkpoint-{STEPS}"), finished)
            own, other = (runs.saved_state(path / newest.name) for path in (again, undisturbed.output_dir))
            runs.assert_same(own, other)  # the damaged one was written anew
            shutil.rmtree(again)
        file.write_bytes(before)


def test_run_resumes_from_the_last_intact_checkpoint(undisturbed, tmp_path, caplog):
    damage_and_resume(undisturbed, tmp_path / "run", places=6, ends=1, caplog=caplog)


@pytest.mark.slow
def test_two_hundred_flipped_bits_are_all_found(undisturbed, tmp_path, caplog):
    damage_and_resume(undisturbed, tmp_path / "run", places=200, ends=20, caplog=caplog)


# Workers and trackers


def test_lost_worker_is_replaced_without_other_changes(undisturbed, tmp_path, capsys):
    changes = {"output_dir": str(tmp_path), "dataloader_num_workers": 2, "train_batch_size": 2}
    run = runs.start(undisturbed.cfg.to_dict() | changes | {"gradient_accumulation_steps": 2})
    killed: list[int] = []

    def kill_a_worker(output) -> None:
        if not killed:
            killed.append(mp.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    at_step(run, 1, kill_a_worker)
    train(run)
    assert run.state.lost_workers == 1
    assert "a data worker was lost" in capsys.readouterr().out
    again = runs.train(run.cfg.to_dict() | {"output_dir": str(tmp_path / "again"), "dataloader_num_workers": 0})
    one, other = (runs.saved_state(r.output_dir / f"checkpoint-{STEPS}") for r in (run, again))
    for state in (one, other):
        del state["run.json"]["state"]["lost_workers"]
    runs.assert_same(one, other)


class Gone(GeneralTracker):
    """Tracker whose server does not answer."""

    name = "gone"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__(_blank=True)

    def store_init_configuration(self, values: dict) -> None:
        raise ConnectionError("no answer")

    def log(self, values: dict, step: int | None = None) -> None:
        raise ConnectionError("no answer")

    def finish(self) -> None:
        raise ConnectionError("no answer")


def test_failing_tracker_does_not_stop_the_run(undisturbed, tmp_path, capsys):
    run = runs.start(undisturbed.cfg.to_dict() | {"output_dir": str(tmp_path), "report_to": "tensorboard"})

    def go_away(output) -> None:
        run.accelerator.trackers = [Gone()]

    at_step(run, 1, go_away)
    train(run)
    assert run.state.tracker_failures == STEPS - 1
    assert "ConnectionError('no answer')" in capsys.readouterr().out
    assert json.loads((tmp_path / "training.json").read_text())["tracker_failures"] == STEPS - 1
    weights = [
        runs.saved_weights(folder / "checkpoint-6", "transformer") for folder in (undisturbed.output_dir, tmp_path)
    ]
    runs.assert_same(*weights)


def test_tracker_that_fails_to_start_does_not_stop_the_run(undisturbed, tmp_path):
    (tmp_path / "logs").write_text("where the folder of the logs would be")
    changes = {"output_dir": str(tmp_path), "report_to": "tensorboard", "max_train_steps": 1}
    assert runs.train(undisturbed.cfg.to_dict() | changes).state.tracker_failures >= 1
