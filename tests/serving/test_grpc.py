"""The gRPC service, asked by Triton's own client and by hand-made messages."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from clsnf.core.errors import SettingsError
from clsnf.detector import Detector
from clsnf.serving import grpc_messages
from clsnf.serving.body_forms import ParsedBody
from clsnf.serving.errors import BadRequest
from clsnf.serving.grpc_messages import (
    GrpcInferBody,
    asked_model,
    message_class,
    parsed,
    written_response,
)
from clsnf.serving.grpc_service import Tls, start_grpc
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings
from clsnf.serving.tensors import InferResponse
from clsnf.serving.tokens import Tokens
from tests.support.small_server import TOKEN, encoded, picture, small_settings


@dataclass(frozen=True)
class Running:
    """A server in a thread of its own."""

    address: str
    service: InspectionService

    def metrics(self) -> str:
        return self.service.metrics.text().decode()


@contextmanager
def grpc_server(settings: ServingSettings, **options: Any) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Any:
        service = InspectionService(settings)
        await service.start()
        return service, await start_grpc(service, "127.0.0.1", 0, **options)

    service, server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield Running(f"127.0.0.1:{server.port}", service)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(30)
        asyncio.run_coroutine_threadsafe(service.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


@pytest.fixture(scope="module")
def server(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = small_settings(winners, state=str(tmp_path_factory.mktemp("grpc")))
    with grpc_server(made) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def plate(winners: Path) -> Detector:
    return Detector.load(winners / "plate", device="cpu")


def pixels(images: list[np.ndarray]) -> triton.InferInput:
    stack = np.stack(images)
    asked = triton.InferInput("images", list(stack.shape), "UINT8")
    asked.set_data_from_numpy(stack)
    return asked


def typed_call(address: str, request: Any, **options: Any) -> Any:
    """ModelInfer with a message that Triton's classes make."""
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        return channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )(request, timeout=60, **options)


def status(error: pytest.ExceptionInfo[InferenceServerException]) -> str:
    return str(error.value.status())


# ---- Triton's client, unmodified ----


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("plate")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata().name == "clsnf"
    metadata = client.get_model_metadata("sheet")
    assert {i.name: i.datatype for i in metadata.inputs} == {"images": "UINT8", "files": "BYTES"}
    assert {o.name: list(o.shape) for o in metadata.outputs}["map"] == [-1, 64, 96]
    assert client.is_model_ready("sheet", metadata.versions[0])
    assert not client.is_model_ready("sheet", "another")
    assert {m.name for m in client.get_model_repository_index().models} == {"plate", "sheet"}
    for name, version, message in (
        ("nothing", "", "There is no model"),
        ("sheet", "another", "no version"),
    ):
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.get_model_metadata(name, version)
        assert status(caught) == "StatusCode.NOT_FOUND"


def test_pixels_get_what_the_detector_gives(
    client: triton.InferenceServerClient, plate: Detector
) -> None:
    images = [picture(seed) for seed in range(3)]
    names = ("score", "verdict", "map", "threshold")
    outputs = [triton.InferRequestedOutput(name) for name in names]
    result = client.infer("plate", [pixels(images)], outputs=outputs, request_id="seven")
    expected = plate.predict(images)
    np.testing.assert_allclose(result.as_numpy("score"), expected.scores, atol=1e-6)
    np.testing.assert_array_equal(result.as_numpy("verdict"), expected.verdicts)
    np.testing.assert_allclose(result.as_numpy("map"), expected.maps, atol=1e-5)
    assert result.as_numpy("p_value") is None
    response = result.get_response()
    assert response.id == "seven"
    assert response.model_version == client.get_model_metadata("plate").versions[0]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_files_of_any_size_get_what_the_detector_gives(
    client: triton.InferenceServerClient, plate: Detector, compression: str | None
) -> None:
    images = [picture(1, (50, 90)), picture(2, (64, 64))]
    asked = triton.InferInput("files", [2], "BYTES")
    asked.set_data_from_numpy(np.array([encoded(image) for image in images], dtype=np.object_))
    result = client.infer("plate", [asked], compression_algorithm=compression)
    np.testing.assert_allclose(result.as_numpy("score"), plate.predict(images).scores, atol=1e-6)
    assert result.as_numpy("p_value").shape == (2,)


@pytest.mark.parametrize("kind", ["images", "files"])
def test_typed_contents_are_read_too(server: Running, plate: Detector, kind: str) -> None:
    image = picture(4)
    request = service_pb2.ModelInferRequest(model_name="plate")
    if kind == "images":
        tensor = request.inputs.add(name=kind, datatype="UINT8", shape=(1, *image.shape))
        tensor.contents.uint_contents.extend(image.ravel().tolist())
    else:
        tensor = request.inputs.add(name=kind, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(encoded(image))
    response = typed_call(server.address, request)
    score = np.frombuffer(response.raw_output_contents[0], np.float32)
    np.testing.assert_allclose(score, plate.predict([image]).scores, atol=1e-6)


def test_what_cannot_be_asked_is_said(client: triton.InferenceServerClient) -> None:
    wrong = triton.InferInput("images", [1, 64, 64, 3], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 64, 64, 3), np.float32))
    half = triton.InferInput("files", [1], "BYTES")
    half.set_data_from_numpy(np.array([encoded(picture())[:200]], dtype=np.object_))
    invalid = "StatusCode.INVALID_ARGUMENT"
    for name, asked, message, code in (
        ("nothing", pixels([picture()]), "There is no model", "StatusCode.NOT_FOUND"),
        ("plate", wrong, "UINT8", invalid),
        ("plate", half, "image 0 is cut short", invalid),
        ("plate", pixels([picture(size=(4, 40))]), "each side", invalid),
        ("plate", pixels([picture(size=(16, 16))] * 17), "at most 16", invalid),
    ):
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.infer(name, [asked])
        assert status(caught) == code
    with pytest.raises(InferenceServerException, match="no output"):
        client.infer(
            "plate", [pixels([picture()])], outputs=[triton.InferRequestedOutput("logits")]
        )
    with pytest.raises(InferenceServerException, match="no version"):
        client.infer("plate", [pixels([picture()])], model_version="another")


def test_calls_are_counted_by_category_and_status(server: Running) -> None:
    with triton.InferenceServerClient(server.address) as client:
        client.infer("plate", [pixels([picture()])])
        with pytest.raises(InferenceServerException):
            client.infer("nothing", [pixels([picture()])])
    text = server.metrics()
    for category, code in (("plate", 200), ("-", 404)):
        assert f'category="{category}",endpoint="grpc"' in text
        assert f'status="{code}"' in text


# ---- sizes ----


def test_large_messages_pass_both_ways(client: triton.InferenceServerClient) -> None:
    image = np.random.default_rng(0).integers(0, 256, (4480, 4480, 3), dtype=np.uint8)  # 57 MiB
    result = client.infer("plate", [pixels([image])])
    assert result.as_numpy("map").shape == (1, 64, 64)


def test_a_message_above_the_limit_is_refused_whatever_its_packing(winners: Path) -> None:
    image = np.zeros((1500, 1500, 3), np.uint8)
    with (
        grpc_server(small_settings(winners, max_megabytes=2)) as running,
        triton.InferenceServerClient(running.address) as client,
    ):
        for compression in (None, "gzip"):
            with pytest.raises(InferenceServerException, match=r"larger|too large"):
                client.infer("plate", [pixels([image])], compression_algorithm=compression)
        assert client.infer("plate", [pixels([picture()])]).as_numpy("score").shape == (1,)


def test_sixteen_maps_of_256x256_come_in_one_answer() -> None:
    values = np.random.default_rng(0).random((16, 256, 256)).astype(np.float32)
    response = InferResponse("plate", "1", None, {"score": values[:, 0, 0]}, list(values))
    answer = service_pb2.ModelInferResponse.FromString(written_response(response, ["map", "score"]))
    assert list(answer.outputs[0].shape) == [16, 256, 256]
    found = np.frombuffer(answer.raw_output_contents[0], np.float32)
    np.testing.assert_array_equal(found, values.ravel())


# ---- limits ----


def test_a_full_queue_and_a_deadline_have_their_status(winners: Path) -> None:
    with (
        grpc_server(small_settings(winners, deadline_s=0.001)) as running,
        triton.InferenceServerClient(running.address) as client,
        pytest.raises(InferenceServerException, match=r"deadline|no answer|not there") as caught,
    ):
        client.infer("plate", [pixels([picture()])])
    assert status(caught) == "StatusCode.DEADLINE_EXCEEDED"
    with (
        grpc_server(small_settings(winners, queue=16)) as running,
        running.service.admit(16),
        triton.InferenceServerClient(running.address) as client,
    ):
        assert client.is_server_live()
        with pytest.raises(InferenceServerException, match="16 images wait") as caught:
            client.infer("plate", [pixels([picture()])])
        assert status(caught) == "StatusCode.RESOURCE_EXHAUSTED"


def test_a_call_that_its_client_gives_up_frees_its_place(server: Running) -> None:
    with triton.InferenceServerClient(server.address) as client:
        with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
            client.infer("plate", [pixels([picture(size=(2000, 2000))])], client_timeout=0.005)
        client.infer("plate", [pixels([picture()])])
    with server.service.admit(server.service.settings.queue):
        pass


def test_calls_that_send_nothing_hold_no_places_and_are_bounded(server: Running) -> None:
    release = threading.Event()

    def nothing() -> Iterator[bytes]:
        release.wait(60)
        yield from ()

    with (
        grpc.insecure_channel(server.address) as channel,
        triton.InferenceServerClient(server.address) as client,
    ):
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        waiting = [call.future(nothing()) for _ in range(17)]
        with pytest.raises(grpc.RpcError, match="messages are under way"):
            next(future for future in as_completed(waiting)).result()
        assert client.is_server_ready()
        with server.service.admit(server.service.settings.queue):
            pass
        release.set()
        for future in waiting:
            assert future.exception().code() in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
        assert client.infer("plate", [pixels([picture()])]).as_numpy("score").shape == (1,)


def as_completed(futures: list[Any]) -> Iterator[Any]:
    """Futures of gRPC as they end."""
    done: queue.Queue[Any] = queue.Queue()
    for future in futures:
        future.add_done_callback(done.put)
    for _ in futures:
        yield done.get(timeout=60)


def test_the_token_comes_before_the_message(winners: Path) -> None:
    tokens = Tokens(TOKEN, None, needed_to_ask=True)
    with (
        grpc_server(small_settings(winners), authorize=tokens.check_ask) as running,
        triton.InferenceServerClient(running.address) as client,
    ):
        assert client.is_server_ready()
        for headers in ({}, {"authorization": "Bearer another"}):
            with pytest.raises(InferenceServerException, match="give the one for asking") as caught:
                client.infer("plate", [pixels([picture()])], headers=headers)
            assert status(caught) == "StatusCode.UNAUTHENTICATED"
        with pytest.raises(InferenceServerException, match="give the one for asking"):
            client.get_model_metadata("plate")
        client.infer("plate", [pixels([picture()])], headers={"authorization": f"Bearer {TOKEN}"})


def test_an_encrypted_server_is_asked_over_tls(winners: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(
        [*command.split(), "subjectAltName=IP:127.0.0.1", *files],
        check=True,
        capture_output=True,
    )
    with (
        grpc_server(small_settings(winners), tls=Tls(certificate, key)) as running,
        triton.InferenceServerClient(
            running.address, ssl=True, root_certificates=str(certificate)
        ) as client,
    ):
        assert client.is_server_live()
        assert client.infer("plate", [pixels([picture()])]).as_numpy("score").shape == (1,)


def test_an_address_that_cannot_be_opened_and_files_that_are_not_there_are_said(
    winners: Path, tmp_path: Path
) -> None:
    for host, options, message in (
        ("203.0.113.7", {}, "can't be opened"),
        ("127.0.0.1", {"tls": Tls(tmp_path / "c.pem", tmp_path / "k.pem")}, "k.pem can't be read"),
    ):

        async def start(host: str = host, options: dict[str, Any] = options) -> None:
            service = InspectionService(small_settings(winners))
            try:
                await start_grpc(service, host, 0, **options)
            finally:
                await service.close()

        with pytest.raises(SettingsError, match=message) as caught:
            asyncio.run(start())
        assert "\n" not in str(caught.value)


# ---- messages ----


def field(number: int, data: bytes) -> bytes:
    """A field of bytes."""
    length, size = bytearray(), len(data)
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes(length) + bytes([size]) + data


def parse(data: bytes) -> ParsedBody:
    return GrpcInferBody(16).parse(memoryview(data))


HOSTILE = {
    "raw contents": b"\x3a\x00" * 100_000,
    "inputs": b"\x2a\x00" * 100_000,
    "files": field(5, field(5, b"\x42\x00" * 100_000)),
    "values that are not packed": field(5, field(5, b"\x20\x01" * 100_000)),
    "a shape": field(5, field(3, b"\x01" * 100_000)),
    "a name": field(1, b"a" * 100_000),
    "no message": b"\xff" * 100,
    "a group": b"\x0b" * 100,
    "half a message": field(1, b"plate")[:-1],
    "an endless number": b"\x80" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_messages_of_too_many_pieces_are_refused_before_they_become_objects(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_be_called(*_: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(grpc_messages, "parsed", must_not_be_called)
    with pytest.raises(BadRequest) as caught:
        parse(HOSTILE[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_gets_a_status_and_the_server_answers_on(
    name: str, server: Running
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        typed_call(server.address, HOSTILE[name])
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    with triton.InferenceServerClient(server.address) as client:
        assert client.is_server_ready()


def test_any_field_may_come_in_any_order_and_unknown_ones_are_skipped() -> None:
    request = service_pb2.ModelInferRequest(model_name="plate", id="x")
    request.inputs.add(name="files", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
        b"data"
    )
    request.outputs.add(name="score").parameters["binary_data"].bool_param = True
    data = field(15, b"new") + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + request.SerializeToString()
    assert asked_model(data) == ("plate", None)
    body = parse(data)
    assert [bytes(body.data[item.start : item.stop]) for item in body.items] == [b"data"]
    assert body.head is not None
    assert (body.head.id, list(body.head.outputs)) == ("x", ["score"])


def typed(values: list[int]) -> bytes:
    """A request with one pixel row of these levels."""
    request = service_pb2.ModelInferRequest(model_name="plate")
    shape = (1, 1, len(values) // 3, 3)
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=shape)
    tensor.contents.uint_contents.extend(values)
    data: bytes = request.SerializeToString()
    return data


def test_typed_levels_are_read_as_protobuf_reads_them() -> None:
    levels = [*range(256), 0, 255]
    assert bytes(parse(typed(levels)).data) == bytes(levels)
    for level in (256, 300, 16_383, 16_384, 2**21, 2**32 - 1):
        with pytest.raises(BadRequest, match="0 to 255"):
            parse(typed([0, level, 1]))
    with pytest.raises(BadRequest, match="can't be parsed"):
        parse(
            field(
                5,
                field(1, b"images")
                + field(2, b"UINT8")
                + field(3, b"\1\1\1\3")
                + field(5, field(4, b"\1\2\x80")),
            )
        )


def test_contents_that_do_not_fit_are_refused() -> None:
    request = service_pb2.ModelInferRequest(model_name="plate")
    tensor = request.inputs.add(name="files", datatype="BYTES", shape=[2])
    with pytest.raises(BadRequest, match="has no data"):
        parse(request.SerializeToString())
    tensor.contents.bytes_contents.append(b"one")
    with pytest.raises(BadRequest, match="holds 1 files"):
        parse(request.SerializeToString())
    request.raw_input_contents.extend([b"", b""])
    with pytest.raises(BadRequest, match="2 raw_input_contents for 1 inputs"):
        parse(request.SerializeToString())
    tensor.contents.Clear()
    tensor.contents.int_contents.append(1)
    del request.raw_input_contents[:]
    with pytest.raises(BadRequest, match="contents of another type"):
        parse(request.SerializeToString())


def test_the_messages_are_the_protocol_s() -> None:
    names = [
        name for name in dir(service_pb2) if name.startswith(("Model", "Server", "Repository"))
    ]
    ours = [name for name in names if _known(name)]
    assert {"ModelInferRequest", "ModelInferResponse", "ServerLiveResponse"} <= set(ours)
    for name in ours:
        _same(message_class(name).DESCRIPTOR, getattr(service_pb2, name).DESCRIPTOR)


def _known(name: str) -> bool:
    try:
        message_class(name)
    except KeyError:
        return False
    return True


def _same(ours: Any, theirs: Any) -> None:
    assert [(f.name, f.number, f.type) for f in ours.fields] == [
        (f.name, f.number, f.type) for f in theirs.fields
    ]
    for field_ in ours.fields:
        if field_.message_type is not None:
            _same(field_.message_type, theirs.fields_by_name[field_.name].message_type)


@pytest.mark.parametrize("order", [("ours", "theirs"), ("theirs", "ours")])
def test_both_descriptions_live_in_one_process(order: tuple[str, str]) -> None:
    imports = {
        "ours": "import clsnf.serving.grpc_messages as ours",
        "theirs": "import tritonclient.grpc as theirs",
    }
    script = "; ".join(imports[name] for name in order)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(BadRequest, match="no ServerLiveRequest"):
        parsed("ServerLiveRequest", b"\xff\xff")


def test_the_compiled_description_is_that_of_the_proto(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    folder = Path(grpc_messages.__file__).parent
    made = tmp_path / "made.binpb"
    done = protoc.main(
        ["protoc", f"-I{folder}", f"--descriptor_set_out={made}", "open_inference.proto"]
    )
    assert done == 0
    assert made.read_bytes() == (folder / "open_inference.binpb").read_bytes()
