"""Answer a batch of prompts and see what speculation saved. Run: python examples/offline.py"""

from paceline import LLM, SamplingParams

QUESTIONS = ["Name three rivers in Europe.", "Why is the sky blue?", "Write a haiku about rain."]

with LLM("smollm2-135m") as llm:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=64)
    for question, answer in zip(QUESTIONS, llm.chat(chats, params), strict=True):
        stats = answer.stats
        print(f"> {question}\n{answer.text}")
        print(f"[{len(answer.token_ids)} tokens from {stats.target_forwards} target forwards]\n")
