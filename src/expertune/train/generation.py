"""Text from a model: one reply to a chat, or the continuation of a prompt."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    stop_tokens: tuple[str, ...] = (),
    together: bool = False,
) -> str:
    """Generate until an end token or `max_new_tokens`.

    prompt: a chat as messages, or a string, which is a user's message where the tokenizer has a chat template and plain
    text to continue where it has none. temperature: 0 is greedy. stop_tokens: more tokens that end the reply.
    together: the model is spread over processes, which all generate the same and wait for the last to end.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is not None:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(stop_tokens))} - {None}
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=together,
                **sampling,
            )
    finally:
        model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
