"""A node of ROS 2 that names what an image topic shows. Not run: no ROS was available; its conversions are tested.

    apt install ros-$ROS_DISTRO-vision-msgs
    python3 ros2_node.py --ros-args -r image:=/camera/image_raw -p root:=/var/lib/ssd-edge

Subscribes to ``image`` (sensor_msgs/Image). Publishes ``classification`` (vision_msgs/Classification), whose header is
that of the image, and ``vision_info`` (vision_msgs/VisionInfo, latched), whose ``database_version`` is the generation:
it changes whenever a class was taught or taken back, also by another process. The names are in the parameter
``classes`` of the same node.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from device_runtime.device import Device, Prediction
from ssd_edge.errors import InputError

# Encodings of sensor_msgs/image_encodings.hpp with 8 bits: number of channels, and where red, green and blue are.
ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}
REFRESH = 1.0  # seconds between two looks at the generation


def to_pixels(message: Any) -> np.ndarray:
    """Return the pixels of a sensor_msgs/Image, uint8 RGB ``(H, W, 3)``.

    Raises:
        InputError: Its encoding is not one of `ENCODINGS`, or it has too few bytes.
    """
    if message.encoding not in ENCODINGS:
        raise InputError(
            f"the encoding of the image is '{message.encoding}', but must be one of {', '.join(ENCODINGS)}; convert "
            "it, e.g. with image_proc"
        )
    channels, order = ENCODINGS[message.encoding]
    row = message.width * channels
    if message.step < row or len(message.data) < message.height * message.step:
        raise InputError(f"an image of {message.width} × {message.height} pixels has only {len(message.data)} bytes")
    rows = np.frombuffer(bytes(message.data), np.uint8, message.height * message.step)
    rows = rows.reshape(message.height, message.step)[:, :row]  # a row may be padded
    return np.ascontiguousarray(rows.reshape(message.height, message.width, channels)[:, :, order])


def fill_classification(message: Any, hypothesis: type, header: Any, prediction: Prediction) -> Any:
    """Write a prediction to a vision_msgs/Classification, and return that.

    Args:
        message: The message.
        hypothesis: vision_msgs/ObjectHypothesis.
        header: Header of the image.
        prediction: The prediction; ``unknown`` is a class like any other, and a score that is not known is NaN.
    """
    result = hypothesis()
    result.class_id = prediction.label
    result.score = float("nan") if prediction.score is None else float(prediction.score)
    message.header = header
    message.results = [result]
    return message


def fill_info(message: Any, method: str, location: str, generation: int) -> Any:
    """Write a generation to a vision_msgs/VisionInfo, and return that."""
    message.method, message.database_location, message.database_version = method, location, generation
    return message


def main() -> None:
    """Run the node."""
    import rclpy
    from rclpy.node import Node
    from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
    from sensor_msgs.msg import Image
    from vision_msgs.msg import Classification, ObjectHypothesis, VisionInfo

    class Classifier(Node):  # type: ignore[misc]  # rclpy has no types
        """The node."""

        def __init__(self) -> None:
            super().__init__("ssd_edge")
            root = self.declare_parameter("root", "").value
            self._device = Device.open(root or None)
            self.declare_parameter("classes", self._device.classes or [""])
            latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
            self._answers = self.create_publisher(Classification, "classification", 10)
            self._infos = self.create_publisher(VisionInfo, "vision_info", latched)
            self.create_subscription(Image, "image", self._on_image, qos_profile_sensor_data)
            self.create_timer(REFRESH, self._on_timer)
            self._publish_info()

        def _on_image(self, image: Any) -> None:
            try:
                (prediction,) = self._device.predict([to_pixels(image)])
            except InputError as error:
                self.get_logger().warning(str(error), throttle_duration_sec=60.0)
                return
            self._answers.publish(fill_classification(Classification(), ObjectHypothesis, image.header, prediction))

        def _on_timer(self) -> None:
            if self._device.refresh():
                self._publish_info()

        def _publish_info(self) -> None:
            self.set_parameters([rclpy.Parameter("classes", value=self._device.classes or [""])])
            location = f"{self.get_name()}/classes"
            info = fill_info(VisionInfo(), self._device.bundle.name, location, self._device.generation.number)
            info.header.stamp = self.get_clock().now().to_msg()
            self._infos.publish(info)

    rclpy.init()
    node = Classifier()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
