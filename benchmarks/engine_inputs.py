"""What every engine is asked: plain texts, and a conversation of three turns with two scripts and odd white space."""

TEXTS = {
    "text": "The history of tea begins in",
    "Chinese": "中国的首都是北京。它",
    "code": "import math\n\n\nclass Point:\n    def __init__(self, x, y):\n",
}
MESSAGES = [
    {"role": "user", "content": "What is a volcano? Answer in one sentence."},
    {"role": "assistant", "content": "A volcano is an opening in the ground through which hot, melted rock comes out."},
    {"role": "user", "content": "Say hello in Chinese."},
    {"role": "assistant", "content": "你好。\n\n  (nǐ hǎo) "},
    {"role": "user", "content": "Thanks! What is 12 plus 30?"},
]
# The conversation as it stands when an answer is due.
TURNS = [MESSAGES[:count] for count in range(1, len(MESSAGES) + 1, 2)]
# The greedy answer to this one is long.
QUESTION = [{"role": "user", "content": "Explain step by step how bread is made."}]
