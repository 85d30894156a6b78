"""Talk to a server with OpenAI's client. Run: paceline serve smollm2-135m, then: python examples/openai_client.py"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),  # the server asks for a key only if it was given one
)
MODEL = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Name three rivers in Europe."}],
    temperature=0,
    max_completion_tokens=32,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# The text you expect back is a free draft; what it was worth is in the usage.
text = "The quick brown fox jumps over the lazy dog, and the dog goes on sleeping in the sun."
answer = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": f"Repeat exactly: {text}"}],
    temperature=0,
    max_completion_tokens=32,
    prediction={"type": "content", "content": text},
    extra_body={"speculation": {"metrics": True}},  # Paceline's own fields travel in `extra_body`
)
print(answer.choices[0].message.content)
print(f"tokens of the prediction that were right: {answer.usage.completion_tokens_details.accepted_prediction_tokens}")
print(f"steps that verified a draft, and what came of it: {answer.metrics['speculative_decoding']}")
