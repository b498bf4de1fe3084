#!/bin/sh
# A folder to publish from a finished run: the model in Hugging Face's format and a model card that says what was done. With --ckpt
# it converts a checkpoint, of either backend and any number of processes. Nothing is trained.
# Data: the folder RUN of any run.
# Needs: one core and memory for the model.
# Change: RUN and OUT in the environment, any flag of togi export after the script's name.
set -eu
"${TOGI:-togi}" export --run_dir "${RUN:?set RUN to the folder of a run}" --output_path "${OUT:-$RUN/export}" "$@"
