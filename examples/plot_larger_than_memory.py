"""
A model larger than memory
==========================

Bases of all heads of a model of 70 billion parameters take 45 GiB. They can be kept on the disk,
and read as they are needed. Here this is watched on a small checkpoint: what is in memory and what
on the disk, what a small budget costs, what is done again after an interruption, and that the
numbers stay what they are.
"""

# %%
# A checkpoint in shards
# ----------------------
#
# ``scripts/make_shaped_checkpoint.py`` writes random numbers in the shape of a known model, one
# shard per layer with an index, as large models come from the hub. These are six layers in the
# shape of a model of 124 million parameters.

import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import skhead

folder = tempfile.TemporaryDirectory()
checkpoint, cache = Path(folder.name) / "checkpoint", Path(folder.name) / "cache"
script = Path(skhead.__file__).parents[1] / "scripts" / "make_shaped_checkpoint.py"
subprocess.run([sys.executable, script, "124M", checkpoint, "--layers", "6"], check=True)
heads = skhead.load_heads(checkpoint)
shards = sorted(checkpoint.glob("*.safetensors"))
print(f"{len(heads)} heads in {len(shards)} shards")

# %%
# On the disk, and in memory
# --------------------------
#
# Without a cache the bases of all heads are held, in float32. With one, the container holds
# addresses. A pickle of it, such as a worker process is sent, shows what either carries.

in_memory = skhead.SubspaceExtractor(roles="OK").fit_transform(heads)
extractor = skhead.SubspaceExtractor(roles="OK", cache=cache, max_memory="50MB")
on_disk = extractor.fit_transform(heads)
files = sorted(cache.iterdir())
sizes = {
    "checkpoint, bfloat16 (Q, K, V, O)": sum(shard.stat().st_size for shard in shards),
    "files of the cache (O, K)": sum(file.stat().st_size for file in files),
    "container without cache": len(pickle.dumps(in_memory)),
    "container with cache": len(pickle.dumps(on_disk)),
}
sizes = pd.Series(sizes, name="bytes")
pd.DataFrame({"MiB": (sizes / 2**20).round(2)})

# %%

figure, ax = plt.subplots(figsize=(7.6, 2.8), layout="constrained")
colours = ["0.7", "0.7", "#D55E00", "#0072B2"]
ax.barh(sizes.index, sizes / 2**20, color=colours)
ax.set(xscale="log", xlabel="size (MiB)")
ax.invert_yaxis()
ax.spines[["top", "right"]].set_visible(False)

# %%
# What a small budget costs
# -------------------------
#
# ``max_memory`` of the kernel bounds its scratch. A small one makes narrow panels, and every basis
# is read more often. The result is the same up to rounding. Each budget is timed on one core.

reference = skhead.ProjectionKernel(pairs=["OK"]).fit_transform(in_memory).values
budgets = [2, 4, 8, 16, 64, 256]
rows = []
for budget in budgets:
    kernel = skhead.ProjectionKernel(pairs=["OK"], max_memory=f"{budget}MB")
    started = time.process_time()
    values = kernel.fit_transform(on_disk).values
    seconds = time.process_time() - started
    difference = np.nanmax(np.abs(values - reference))
    rows.append({"budget (MB)": budget, "seconds": seconds, "largest difference": difference})
cost = pd.DataFrame(rows).set_index("budget (MB)")
cost.map("{:.2g}".format)

# %%

figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
ax.plot(cost["seconds"], "o-", color="#0072B2")
ax.set(xscale="log", xlabel="max_memory of the kernel (MB)", ylabel="processor time (s)")
ax.set_ylim(bottom=0)
ax.set_xticks(budgets, budgets)
ax.minorticks_off()
ax.spines[["top", "right"]].set_visible(False)
# sphinx_gallery_thumbnail_number = 2

# %%
# After an interruption
# ---------------------
#
# A file is finished before it gets its name, so that whatever is in the directory can be used. If
# a run stops halfway, or two layers are lost, the next one computes what is missing and no more.

for lost in files[:2]:
    lost.unlink()
before = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
extractor.fit_transform(heads)
after = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
anew = [name for name, changed in after.items() if before.get(name) != changed]
print(f"{len(anew)} of {len(after)} files written anew")

# %%
# Other weights, ranks or folding have other names, so that old bases are never taken for new ones.

# %%

folder.cleanup()
