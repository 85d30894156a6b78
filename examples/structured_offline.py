"""Output that fits a JSON schema, a regular expression or a list of choices: `python examples/structured_offline.py`.

A grammar masks the model's law at every token, so what comes always parses. Most of JSON's punctuation and all its keys
are dictated by the schema: the drafter `grammar` (part of `auto`) drafts them for free.
"""

from __future__ import annotations

from paceline import LLM, SamplingParams, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"enum": ["chess", "tennis", "cooking"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
}
QUESTIONS = {
    "Invent a person: name, age and hobbies.": StructuredOutput(json_schema=PERSON),
    "On which day did people first walk on the moon?": StructuredOutput(regex=r"19[0-9]{2}-[01][0-9]-[0-3][0-9]"),
    "Is Paris the capital of France?": StructuredOutput(choice=("yes", "no")),
}

if __name__ == "__main__":
    with LLM("smollm2-135m", max_model_len=512) as llm:
        for question, structured in QUESTIONS.items():
            params = SamplingParams(temperature=0.0, max_tokens=96, structured=structured)
            answer = llm.chat([{"role": "user", "content": question}], params)[0]
            print(f"{answer.text}   ({len(answer.token_ids)} tokens in {answer.stats.target_forwards} forwards)")
