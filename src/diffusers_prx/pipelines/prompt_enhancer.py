"""Short prompts to long captions, by a language model. PRX learned from long captions and draws them best."""

from typing import Any

import torch
from diffusers.utils import logging
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..schedulers.scheduling_prx import check_count

logger = logging.get_logger(__name__)

TEMPLATE = """\
Describe a picture of the following prompt in one paragraph of four to six sentences. Name the subjects, their \
colors, where they are, the background, the light and the style. Keep everything that the prompt says, and write only \
the description.

Prompt: {prompt}
Description:"""


class PromptEnhancer:
    """Rewrite short prompts as long captions with a causal language model of transformers.

    It is a function from a list of prompts to a list of prompts: `prompt_enhancer=` of a pipeline's call takes it, or
    any other function of this form. The same prompt and seed give the same caption, whatever else is in the list.

    Args:
        model: causal language model.
        tokenizer: its tokenizer. If it has a chat template, the text is a message of the user.
        template: text with `{prompt}`.
        seed: seed of the caption's words; None for the most likely ones.
        max_new_tokens: longest caption, in tokens of the language model.

    Raises:
        ValueError: if an argument is not as described.

    Example:
        >>> enhancer = PromptEnhancer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
        >>> image = pipe("a red cat", prompt_enhancer=enhancer).images[0]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str = TEMPLATE,
        seed: int | None = 0,
        max_new_tokens: int = 200,
    ):
        if not isinstance(template, str) or "{prompt}" not in template:
            raise ValueError(f"`template` is {template!r}; it must be a text with `{{prompt}}` in it.")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"`seed` is {seed!r}; it must be an integer, or None.")
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.template = template
        self.seed = seed
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "PromptEnhancer":
        """Load model and tokenizer.

        Args:
            name_or_path: folder or Hub id of a causal language model.
            dtype: dtype of the weights; "auto" for the stored one.
            device: device of the model; None: the CPU.
            kwargs: `template`, `seed` and `max_new_tokens`.

        Example:
            >>> enhancer = PromptEnhancer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", device="cuda", seed=1)
        """
        model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        return cls(model if device is None else model.to(device), tokenizer, **kwargs)

    def __call__(self, prompts: list[str]) -> list[str]:
        """Return a caption for each prompt. A prompt for which the model writes nothing stays, with a warning.

        Example:
            >>> enhancer(["a red cat"])
        """
        return [self._rewrite(prompt) for prompt in prompts]

    @torch.no_grad()
    def _rewrite(self, prompt: str) -> str:
        text = self.template.replace("{prompt}", prompt)
        is_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if is_chat:
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        device = self.model.device
        # a chat template has the special tokens already
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=not is_chat).to(device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        # `generate` draws from the global generators: give them back as they were
        own_device = {} if device.type == "cpu" else {"device_type": device.type}
        with torch.random.fork_rng([device] if own_device else [], **own_device):
            torch.manual_seed(0 if self.seed is None else self.seed)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.max_new_tokens,
                do_sample=self.seed is not None,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        caption = " ".join(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())
        if not caption:
            logger.warning(f"The language model writes nothing for the prompt {prompt!r}, which stays as it is.")
        return caption or prompt
