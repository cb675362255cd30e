#!/usr/bin/env bash
# The whole path on CIFAR-10: train nine classes → deploy → install → teach the tenth → predict → undo.
#
#   SSD_EDGE_DATA=FOLDER examples/cifar10.sh [WORK]
#
# FOLDER holds cifar10-jpg.tar.xz; WORK (default: a new temporary folder) receives the run, the bundle, the
# device's state and 100 images of the new class. Needs `ssd-edge` on the PATH (make train puts it in .venv/bin).
set -euo pipefail
config="$(cd "$(dirname "$0")" && pwd)/cifar10.yaml"
work="${1:-$(mktemp -d)}"
mkdir -p "$work" && cd "$work"
export SSD_EDGE_ROOT="$work/device"

echo "── workstation: nine classes, task by task"
ssd-edge train --config "$config" run.out=runs
ssd-edge deploy --target jetson runs/1 -o robot.ssdedge

echo "── device: install, and look at 100 pictures of trucks before it knows what a truck is"
ssd-edge device install robot.ssdedge
tar xf "$SSD_EDGE_DATA/cifar10-jpg.tar.xz" train/truck test/truck
mkdir -p new unseen
for f in $(ls train/truck | head -100); do cp "train/truck/$f" new/; done
for f in $(ls test/truck | head -100); do cp "test/truck/$f" unseen/; done
count() { ssd-edge device predict unseen | awk '{print $2}' | sort | uniq -c | sort -rn; }
count

echo "── teach it from 100 images, without any image of the other nine"
ssd-edge device learn --label truck new
count
ssd-edge device history

echo "── and undo it"
ssd-edge device rollback
count
echo "everything is in $work"
