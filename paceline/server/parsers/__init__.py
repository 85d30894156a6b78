"""From the text a model generates to the parts of an OpenAI answer: content, reasoning, tool calls.

Pure text: no model, no HTTP, no tensors. `registry.create` gives the parser of a format, `registry.detect` guesses the
format from a chat template, `constraint.tool_grammar` describes the text of a forced call, `fallback` teaches tools to
models whose template has no place for them.
"""
