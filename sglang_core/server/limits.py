"""Bounds of what one HTTP request may ask for. They keep one caller from taking the server's memory or time."""

MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0  # frequency and presence: [-2, 2]; repetition: (0, 2]
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 1024
MAX_N = 128
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_TOP_LOGPROBS = 20  # OpenAI's own bound
MAX_TOP_LOGPROBS_NATIVE = 128
MAX_ADAPTER_CHARS = 128
MAX_PATH_CHARS = 4096
MAX_RID_CHARS = 200
MAX_SALT_CHARS = 256
MAX_ANSWERS = 4096  # prompts x n of one body
MAX_TOKENS = 2**31 - 1  # the context length is the real bound; this one keeps numbers within int32
MAX_SEED = 2**63
MAX_PRIORITY = 2**31 - 1
MAX_CHARS_PER_TOKEN = 64  # longer texts than this a context token are probed before they are tokenised whole
HEALTH_TIMEOUT = 20.0  # seconds that /health_generate waits for its token
STATS_TIMEOUT = 2.0  # seconds that /metrics waits for the engine's gauges
