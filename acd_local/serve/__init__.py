"""Answers over HTTP, in the form that clients of OpenAI's interface expect."""
