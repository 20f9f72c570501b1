"""Engine on a server that runs already: vLLM, SGLang, or another with OpenAI's API, over HTTP."""
