"""Record outputs for `paceline bench replay --trace`. Run: python examples/record_outputs.py > outputs.jsonl"""

import json

from paceline import LLM, SamplingParams

QUESTIONS = [
    "Name three rivers in Europe.",
    "List the numbers from 1 to 30, one per line.",
    "Write a Python function that reverses a list, then write it again with type hints.",
]

with LLM("smollm2-135m") as llm:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=96))
    for number, answer in enumerate(answers):
        row = {"id": str(number), "prompt_token_ids": answer.prompt_token_ids, "generated_token_ids": answer.token_ids}
        print(json.dumps(row))
