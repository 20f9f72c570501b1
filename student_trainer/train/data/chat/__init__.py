"""Conversations: rendered with chat templates, and masked to the text that the assistant writes."""
