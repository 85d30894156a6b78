"""The HTTP bodies: OpenAI's, with vLLM's extra fields and Paceline's own. Pydantic appears only at this edge."""
