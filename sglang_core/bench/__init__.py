"""Load generation and timing: workloads, a client for any OpenAI-compatible server, metrics, reports."""
