"""The server: a fair queue in front of the model, an OpenAI-style API, and limits on what a request may do."""
