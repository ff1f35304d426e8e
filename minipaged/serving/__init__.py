"""The system around the engine: an event loop in front of it, OpenAI's API, a dashboard."""
