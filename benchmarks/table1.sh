#!/usr/bin/env bash
# Trains the tokenizers of Table 1: TexTok and its baseline, 32 to 256 tokens, at 256 and 512 px. Run it again after an interruption: an
# unfinished run goes on, a finished one takes no further step. Other keys or images than its own are refused: give another OUT.
#
#   TRAIN='shards/train-{0000..1023}.tar' VAL=shards/val.tar benchmarks/table1.sh [key=value ...]
#
# LAUNCH starts each run (default: texttok); for 8 GPUs: LAUNCH='torchrun --nproc-per-node 8 -m texttok_cli'.
# SIZES, TOKENS, KINDS narrow the grid; OUT is the folder of the runs (default runs/table1).
set -euo pipefail
: "${TRAIN:?name the training images, e.g. TRAIN='shards/train-{0000..1023}.tar'}"
read -ra launch <<< "${LAUNCH:-texttok}"
for size in ${SIZES:-256 512}; do
  for tokens in ${TOKENS:-32 64 128 256}; do
    for kind in ${KINDS:-texttok baseline}; do
      run="${OUT:-runs/table1}/$kind-$tokens-$size"
      "${launch[@]}" train "tokenizer/$kind-$tokens-$size" "data.train=$TRAIN" "data.val=${VAL:-[]}" "$@" --out "$run"
    done
  done
done
