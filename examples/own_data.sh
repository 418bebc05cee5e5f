#!/usr/bin/env bash
# From files as a hospital has them to a report, in some minutes on a laptop: DICOM, PNG and CSV -> arrow files ->
# pre-training -> fine-tuning -> evaluation -> pictures, a report, and the towers for other programs.
# usage: examples/own_data.sh FOLDER [STEPS OF PRE-TRAINING]    with fastm3ae[dicom] in the PATH
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
steps=${2:-300}
mkdir -p "$1" && cd "$1"

python "$here/hospital_files.py" files
fastm3ae prepare csv files/table.csv arrows --image-column file --text-columns findings impression --join \
    --group-column patient --name mine
fastm3ae pretrain --preset demo --data.no-draw-demo --data.root arrows --data.datasets mine \
    --data.tokenizer files/tokenizer --train.num-steps "$steps" --train.validate-every-steps "$((steps / 2))" \
    --train.batch-size 32 --output runs/mine
fastm3ae finetune retrieval --preset roco --init-from runs/mine/checkpoints/best --data.root arrows --data.datasets mine \
    --model.vision.image-size-px 96 --optim.learning-rate 1e-4 --train.num-epochs 2 --train.batch-size 16 \
    --output runs/retrieval
fastm3ae evaluate runs/retrieval/checkpoints/best --split test --output runs/retrieval/evaluation
fastm3ae visualize reconstruct runs/mine/checkpoints/best --images files/images/0000.dcm files/images/0001.png \
    --output pictures
fastm3ae report runs/mine
fastm3ae report runs/retrieval
fastm3ae export vision runs/mine/checkpoints/best towers/vision
fastm3ae export text runs/mine/checkpoints/best towers/text
