#!/usr/bin/env bash
# An experiment sweep from the shell: tokenizers of several token counts with text and without, each evaluated, all results in one report.
# Run it again after an interruption: an unfinished run goes on, a finished one takes no further step, a finished report is left alone.
# Other keys or images than a run's own are refused: give another OUT. For the paper's columns of Fig. 3 and Table 1, which are of 50,000
# training images, evaluate the finished models by `texttok eval --protocol recon --data TRAIN`.
#
#   TRAIN='train-{0000..0015}.tar' VAL=val.tar benchmarks/sweep.sh [key=value ...]
#
# Any key of the recipe can be changed for all runs, as schedule.steps=2000. TOKENS and KINDS narrow the sweep, SIZE is 256 or 512 pixels or
# '256 512', RECIPE the recipes (default the paper's; RECIPE=tiny/KIND-32-128 for small models of any number of tokens, with SIZE=128, which
# names their runs), IMAGES how many of VAL are evaluated (VAL= for none: train alone), CAPTION_FIELD which key of a shard's .json is the
# caption, OUT the folder of everything (default runs/sweep), LAUNCH what starts a run (default texttok; for 8 GPUs
# 'torchrun --nproc-per-node 8 -m texttok_cli').
set -euo pipefail
: "${TRAIN:?name the training images, e.g. TRAIN='train-{0000..0015}.tar'}" "${VAL?name held-out images, e.g. VAL=val.tar, or none, VAL=}"
read -ra launch <<< "${LAUNCH:-texttok}"
if [[ -n "${RECIPE:-}" && "$RECIPE" != *KIND* ]]; then echo "RECIPE=$RECIPE: put KIND where texttok or baseline stands" >&2; exit 2; fi
out="${OUT:-runs/sweep}"
for size in ${SIZE:-256}; do
  for tokens in ${TOKENS:-32 64 128 256}; do
    for kind in ${KINDS:-texttok baseline}; do
      name="$kind-$tokens-$size"
      run="$out/$name" result="$out/results/$name.json"
      recipe="${RECIPE:-tokenizer/$name}"
      "${launch[@]}" train "${recipe//KIND/$kind}" "model.num_tokens=$tokens" "data.train=$TRAIN" "data.val=${VAL:-[]}" \
        ${CAPTION_FIELD:+"data.caption_field=$CAPTION_FIELD"} "$@" --out "$run"
      if [[ -n "$VAL" && ! -f "$result" ]]; then
        texttok eval --metric rfid,psnr,ssim --model "$run/model.safetensors" --data "$VAL" \
          ${IMAGES:+-n "$IMAGES"} ${CAPTION_FIELD:+--caption-field "$CAPTION_FIELD"} -o "$result"
      fi
    done
  done
done
if [[ -n "$VAL" ]]; then texttok bench report "$out/results" -o "$out/report"; fi
