"""vLLM as an engine: in this process, or behind its OpenAI server by URL."""
