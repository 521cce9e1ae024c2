from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def ready(request: Request) -> Response:
    stopping = request.state.aioserve.stopping.is_set()
    return Response(status_code=503 if stopping else 200)


app = Starlette(routes=[Route("/", hello), Route("/ready", ready)])
