"""``--mqtt``: each result as JSON on a topic of a broker, and the watch's status beside it.

Results are published with QoS 1 on ``TOPIC``: the broker confirms each. ``TOPIC/status`` is
retained and holds the last heartbeat; where the watch dies, the broker puts ``"stopped"`` there
(the last will).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from clsnf.core.errors import OutageError, SettingsError
from clsnf.core.secrets import read_secret, refuse_password
from clsnf.watching.output import Output, OutputContext, import_extra
from clsnf.watching.result import Result, now
from clsnf.watching.status import Status

PASSWORD = "CLSNF_MQTT_PASSWORD"
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_START = 5.0  # seconds in which a broker that is there answers
_CONFIRMED = 10.0  # seconds in which it confirms a result


class MqttTopic(Output):
    """A topic of one broker.

    A broker that is away is connected again in the background. One that refuses the user at the
    start ends the command; later, results wait until it takes the user again.
    """

    keeps_history, batch = True, 20

    def __init__(self, target: str, context: OutputContext) -> None:
        super().__init__(target, context)
        mqtt: Any = import_extra("paho.mqtt.client", "--mqtt", "mqtt")
        refuse_password(target, "--mqtt", PASSWORD)
        try:
            parts = urlsplit(target)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        self._topic = unquote(parts.path.strip("/"))
        if parts.scheme not in _PORTS or not parts.hostname or not self._topic:
            raise SettingsError(
                "--mqtt is no address of a topic: give mqtt://USER@HOST:1883/TOPIC, or mqtts://."
            )
        if any(sign in self._topic for sign in "+#"):
            raise SettingsError(f"--mqtt: nothing can be published on {self._topic!r}: no + or #.")
        self._broker = (parts.hostname, port or _PORTS[parts.scheme])
        self._answered, self._refusal, self._away_told = threading.Event(), "", False
        self._sent: dict[str, Any] = {}  # published and not yet confirmed, by the result's id
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=f"clsnf-watch-{context.state_id}"
        )
        if parts.username is not None:
            self._client.username_pw_set(unquote(parts.username), read_secret(PASSWORD))
        if parts.scheme == "mqtts":
            self._client.tls_set()
        last_will = json.dumps(Status(now(), "stopped", "the watch is gone").to_plain())
        self._client.will_set(f"{self._topic}/status", last_will, qos=1, retain=True)
        self._client.reconnect_delay_set(1, 15)
        self._client.on_connect = self._on_connect

    def _on_connect(
        self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        self._refusal = str(reason) if reason.is_failure else ""
        self._answered.set()

    def open(self) -> None:
        """Connect. Raises SettingsError where the broker refuses the user."""
        host, port = self._broker
        try:
            self._client.connect_async(host, port, keepalive=20)
        except ValueError as error:
            raise SettingsError(f"--mqtt {host}:{port}: {error}.") from error
        self._client.loop_start()
        if not self._answered.wait(_START):
            self.context.say(f"--mqtt: no broker answers at {host}:{port}: results wait for it")
        elif self._refusal:
            self._client.loop_stop()
            raise SettingsError(
                f"The MQTT broker {host}:{port} refuses the user ({self._refusal}): check the "
                f"user's name in --mqtt, and the password in {PASSWORD} or the file that "
                f"{PASSWORD}_FILE names."
            )

    def deliver(self, results: Sequence[Result]) -> None:
        """Publish the results, and wait until the broker has confirmed all."""
        host, port = self._broker
        if not self._client.is_connected():
            cause = f" (it refuses the user: {self._refusal})" if self._refusal else ""
            raise OutageError(f"the broker {host}:{port} is away{cause}")
        for result in results:
            # What waits for its confirmation is sent again by the client itself.
            if result.id not in self._sent:
                self._sent[result.id] = self._client.publish(self._topic, result.to_json(), qos=1)
        for result in results:
            try:
                self._sent[result.id].wait_for_publish(_CONFIRMED)
                confirmed = self._sent[result.id].is_published()
            except (RuntimeError, ValueError):  # it was never sent
                del self._sent[result.id]
                confirmed = False
            if not confirmed:
                raise OutageError(f"the broker {host}:{port} confirms nothing")
        for result in results:
            self._sent.pop(result.id, None)

    def tell(self, status: Status) -> None:
        """Publish the status; one that the broker does not get is not repeated."""
        if self._client.is_connected():
            self._client.publish(f"{self._topic}/status", json.dumps(status.to_plain()), 0, True)

    def close(self, status: Status) -> None:
        """Say that the watch ended, and disconnect."""
        if self._client.is_connected():
            text = json.dumps(status.to_plain())
            said = self._client.publish(f"{self._topic}/status", text, 1, True)
            said.wait_for_publish(2.0)
        self._client.disconnect()
        self._client.loop_stop()
