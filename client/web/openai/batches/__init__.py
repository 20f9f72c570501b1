"""Files and batches of OpenAI's API, kept in a folder of the operator and worked through by processes of their own."""
