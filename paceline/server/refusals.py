"""Fields of other servers that are not served here, each with its reason. They are refused rather than ignored, since
an answer without them would not be what was asked for."""

from __future__ import annotations

_LORA = "LoRA adapters cannot be chosen by request; merge the adapter into the model and serve that."
_GUIDED = "is an older name; use structured_outputs."
_MEDIA = "only text is served."

REASONS = {
    **dict.fromkeys(("lora", "lora_request", "lora_path", "lora_name", "adapter", "adapter_id", "adapters"), _LORA),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), _GUIDED),
    **dict.fromkeys(("audio", "images", "videos", "mm_processor_kwargs", "documents"), _MEDIA),
    "suffix": "text is only continued, not filled in; leave it empty.",
    "bad_words": "is not served; use logit_bias.",
    "allowed_token_ids": "is not served; use structured_outputs or logit_bias.",
    "truncate_prompt_tokens": "prompts are never cut silently; cut it before.",
    "prompt_logprobs": "is not served; use /v1/completions with echo and logprobs.",
    "thinking_token_budget": "reasoning has no budget of its own; use max_completion_tokens.",
    "priority": "requests are served first come, first served.",
    "vllm_xargs": "belongs to vLLM's plugins; speculation has its own field.",
    "moderation": "nothing is moderated here.",
    "skip_special_tokens": "special tokens are always left out of the text; return_token_ids shows them.",
    "include_stop_str_in_output": "the text always ends before the stop string.",
    "include_reasoning": "reasoning is always reported, in reasoning_content.",
    "functions": "is deprecated; use tools.",
    "function_call": "is deprecated; use tool_choice.",
    "chat_template": "templates come with the model, never with a request.",
    "prompt_embeds": "prompts are text or token ids.",
    "use_beam_search": "beam search is not served; take several samples with n.",
    "web_search_options": "the server reaches no other server.",
    "logits_processors": "no code is taken from requests; use logit_bias or structured_outputs.",
    "best_of": "samples are not ranked; use n.",
}
"""Field of a request's body -> why it is refused."""
