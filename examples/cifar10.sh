#!/usr/bin/env bash
# The complete workflow on CIFAR-10: train nine classes → deploy → install → teach the tenth → predict → roll back.
#
#   SSD_EDGE_DATA=FOLDER examples/cifar10.sh [WORK]
#
# FOLDER contains cifar10-jpg.tar.xz. The run, the bundle, the state of the device and 100 images of the new class
# are written to WORK (default: a new temporary folder). Needs `ssd-edge` on the PATH (make train puts it in .venv/bin).
set -euo pipefail
config="$(cd "$(dirname "$0")" && pwd)/cifar10.yaml"
work="${1:-$(mktemp -d)}"
mkdir -p "$work" && cd "$work"
export SSD_EDGE_ROOT="$work/device"

echo "── workstation: nine classes, task by task"
ssd-edge train --config "$config" run.out=runs
ssd-edge deploy --target jetson runs/1 -o robot.ssdedge

echo "── device: install, and classify 100 images of trucks before it has learned that class"
ssd-edge device install robot.ssdedge
tar xf "$SSD_EDGE_DATA/cifar10-jpg.tar.xz" train/truck test/truck
mkdir -p new unseen
for f in $(ls train/truck | head -100); do cp "train/truck/$f" new/; done
for f in $(ls test/truck | head -100); do cp "test/truck/$f" unseen/; done
count() { ssd-edge device predict unseen | awk '{print $2}' | sort | uniq -c | sort -rn; }
count

echo "── teach it from 100 images, without any image of the other nine classes"
ssd-edge device learn --label truck new
count
ssd-edge device history

echo "── roll back"
ssd-edge device rollback
count
echo "everything is in $work"
