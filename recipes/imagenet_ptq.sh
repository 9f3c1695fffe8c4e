#!/bin/sh
# Post-training quantization on ImageNet, beside published figures. NOT RUN BY US: it needs ImageNet and some hours of a GPU.
#
#   sh recipes/imagenet_ptq.sh /path/to/imagenet out [further flags of tweo-validate, --device cuda say]
#
# Each model: 32 and 128 calibration images, three seeds. Put the reports side by side with
#   tweo-validate --compare-reports out/*/report.json --report out/all
#
# Published, ImageNet Top-1 in percent (GLF-Q's table; FQ-ViT's for 8/8/8, the nearest to +res):
#                                ViT-S   ViT-B   DeiT-S   Swin-S
#   float                        81.39   84.54   79.85    83.23
#   W8A8 in TensorRT (GLF-Q)     80.35     -     79.07    83.08    compare with w8a8-ct
#   8/8/8 MinMax (FQ-ViT)          -     23.64   75.05    74.37    compare with w8a8-tt+res
#   8/8/8 FQ-ViT                   -     83.31   79.17    82.71    compare with w8a8-ct+res+rot
#   W4A4 RepQ-ViT                65.05   68.48   69.03    79.45    compare with w4a4-ck
#   W4A4 FIMA-Q                  76.68   83.04   76.87    81.82
#   W4A4 GLF-Q                   77.82   83.22   77.34    82.01
# Their quantizers, calibration sets and checkpoints differ from ours in part: the columns are for orientation.
set -eu
data=${1:?usage: imagenet_ptq.sh IMAGENET OUT [flags]}
out=${2:?usage: imagenet_ptq.sh IMAGENET OUT [flags]}
shift 2
for model in vit_small_patch16_224.augreg_in21k_ft_in1k vit_base_patch16_224.augreg_in21k_ft_in1k \
    deit_small_patch16_224.fb_in1k swin_small_patch4_window7_224.ms_in1k; do
    for images in 32 128; do
        for seed in 0 1 2; do
            report="$out/$model-$images-$seed"
            test -f "$report/report.json" && continue
            tweo-validate --model "$model" --pretrained --data-dir "$data" --calibration-images "$images" --seed "$seed" \
                --quantize fp16 fp8 w8a8-ct w8a8-tt+res w8a8-ct+res w8a8-ct+res+rot w4a4-ck --report "$report" "$@"
        done
    done
done
