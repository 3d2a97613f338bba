"""The outputs, by the names of their options."""

from __future__ import annotations

from clsnf.watching.output import Output
from clsnf.watching.output_files import Overlays, ResultsFile, Sorted
from clsnf.watching.output_modbus import ModbusPlc
from clsnf.watching.output_mqtt import MqttTopic
from clsnf.watching.output_webhook import Webhook

OUTPUTS: dict[str, type[Output]] = {
    "out": ResultsFile,
    "overlays": Overlays,
    "sort": Sorted,
    "mqtt": MqttTopic,
    "webhook": Webhook,
    "modbus": ModbusPlc,
}
