"""Train a LoRA adapter for a saved PRX pipeline:

`accelerate launch training/train_prx_lora.py --pretrained_model_name_or_path outputs/quickstart \\
  --train_data_dir FOLDER --instance_prompt "a star" --output_dir outputs/star`

This is train_prx.py with other defaults. The pipeline provides prediction type, noise scale, resolution, shift, token
limit and caption cleaning.
"""

from pathlib import Path

from diffusers_prx.cli import exit_on_error, print_notes
from diffusers_prx.training.recipes import parse_run_config
from diffusers_prx.training.setup import set_up_run
from diffusers_prx.training.trainer import train

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"

DEFAULTS = {
    "lora_rank": 16,
    "output_dir": "outputs/prx-lora",
    "train_batch_size": 4,
    "max_train_steps": 500,
    "lr_warmup_steps": 0,
    "max_grad_norm": 1.0,
    "caption_dropout": 0.0,  # keeps the unconditional branch unchanged
    "checkpointing_steps": 500,
    "validation_steps": 250,
}


def main(argv: list[str] | None = None) -> None:
    with exit_on_error():
        cfg, notes = parse_run_config(argv, DEFAULTS)
        if cfg.lora_rank is None:
            raise ValueError("`lora_rank` is null: pass a rank, or train the whole transformer with train_prx.py.")
        print_notes(notes)
        train(set_up_run(cfg, CARD_TEMPLATE))


if __name__ == "__main__":
    main()
