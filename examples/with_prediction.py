"""Use the text you expect back as a free draft. Run: python examples/with_prediction.py"""

from paceline import LLM, SamplingParams

CODE = """```python
def greet(name):
    message = "Hello, " + name + "!"
    print(message)
    return message
```"""
REQUEST = f'{CODE}\n\nChange "Hello" to "Good morning" and show the complete code.'

with LLM("smollm2-135m", speculation="prediction") as llm:
    for prediction in (None, CODE):
        params = SamplingParams(temperature=0.0, max_tokens=64, prediction=prediction)
        [answer] = llm.chat([{"role": "user", "content": REQUEST}], params)
        print(f"prediction {'on' if prediction else 'off'}: {answer.stats.target_forwards} target forwards")
    print(answer.text)
