"""Which recipe teaches how fast: other trainers' defaults and ours (`peers`), and what moves ours (`moves`)."""
