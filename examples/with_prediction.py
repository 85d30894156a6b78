"""Use the text you expect back as a free draft. Run: python examples/with_prediction.py"""

from paceline import LLM, SamplingParams

CODE = "def area(a, b):\n    return a * b\n\n\ndef border(a, b):\n    return 2 * (a + b)\n"
REQUEST = f"Rename the function `border` to `outline`. Answer with the whole code.\n\n{CODE}"

with LLM("smollm2-135m", speculation="prediction") as llm:
    messages = [{"role": "user", "content": REQUEST}]
    for prediction in (None, CODE):
        params = SamplingParams(temperature=0.0, max_tokens=64, prediction=prediction)
        [answer] = llm.chat(messages, params)
        print(f"prediction {'on' if prediction else 'off'}: {answer.stats.target_forwards} target forwards")
    print(answer.text)
