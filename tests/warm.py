"""What the server of `forked.py` imports before it is asked for a process, so that none of these has to."""

import gc
import threading

import torch.distributed.fsdp  # noqa: F401
import transformers.models.bert.modeling_bert
import transformers.models.clip.modeling_clip
import transformers.models.llava.modeling_llava
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from tqdm import tqdm

import glue_moefy  # noqa: F401
import stgc_hf  # noqa: F401
import toy_lvlm  # noqa: F401

tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which a killed process leaves behind
gc.collect()
gc.freeze()  # as in conftest.py
