"""Typed answers and tool calls. Run: paceline serve smollm2-135m, then: python examples/structured.py"""

import os
from typing import Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
MODEL = client.models.list().data[0].id


class Review(BaseModel):
    """What the answer must look like."""

    mood: Literal["positive", "negative"]
    about: Literal["food", "service", "price"]
    stars: int = Field(ge=1, le=5)


class Weather(BaseModel):
    """Look up the weather of a city."""

    city: str = Field(max_length=30)  # a bound lets a small model finish
    unit: Literal["celsius", "fahrenheit"]


review = client.chat.completions.parse(
    model=MODEL,
    messages=[{"role": "user", "content": "Review: 'The food was cold.' Describe it in JSON."}],
    response_format=Review,
    temperature=0,
)
print(review.choices[0].message.parsed)

messages = [{"role": "user", "content": "What is the weather in Oslo, in celsius?"}]
called = client.chat.completions.parse(
    model=MODEL,
    messages=messages,
    tools=[pydantic_function_tool(Weather)],
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
)
[call] = called.choices[0].message.tool_calls
print(call.function.name, call.function.parsed_arguments)

messages += [called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "7 degrees, rain"}]
final = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=32)
print(final.choices[0].message.content)
