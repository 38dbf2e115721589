"""Before torch is imported: tests share their cores with others, and use several processes at once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A step that torch compiles takes 20 s for its first shape; the one test of that sets its own environment.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
