"""OpenAI's API on the teachers: completions, chat and models, for programs that speak it."""
