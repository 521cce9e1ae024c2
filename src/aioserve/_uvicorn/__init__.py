"""
The only readers of uvicorn's private parts. When uvicorn changes, this folder changes and nothing else.

What it relies on, in uvicorn 0.40 to 0.54 (a test names each of these, and says what breaks without it):

- The protocols are made with `config`, `server_state` and `app_state`. They put themselves into
  `server_state.connections` with `add()`, and out of it with `discard()` (HTTP) or `remove()` (WebSocket); an upgrade
  takes one out and puts another in. `server_state.tasks` holds a task for each request or WebSocket.
- HTTP protocols read their own `server_state.default_headers` at each request, and count up
  `server_state.total_requests` when a response is complete. In between there is `cycle`: with `scope`,
  `transport`, `default_headers`, `response_complete`, `more_body`, `disconnected`, `message_event`, `on_response` and
  `logger`, which logs what a handler raises as `exc_info` of an `error()`. A protocol's `access_log` can be set, and
  `connections` and `tasks` are the state's. `flow.resume_reading()` lets its transport read on.
- A connection's `server` is where its scopes have `server` from.
- Their `timeout_keep_alive_task` is a timer after a response, and `None` again as soon as more bytes have arrived. A
  lost connection can leave it behind.
- Whether a part of a next request has arrived: httptools' `scope` and `pipeline` and h11's `conn.trailing_data` say so.
  h11's `conn.their_state` says whether it is the part of a body.
- Each protocol has `transport`, and `shutdown()`: it closes an idle connection, and a WebSocket with 1012.
- A WebSocket's `handshake_complete` says whether its app has accepted or refused it; with a response of its own,
  `response_started` (wsproto) or `initial_response` (websockets-sansio) says that this has begun, and `close_sent` that
  it is complete. `receive()` takes its messages from `queue`, and `send()` waits for `writable` before anything else.
- The legacy WebSocket protocol has `handshake_started_event` and `handshake_completed_event` for that: between the two,
  its `handler_task` sends the answer. `receive()` says 1012 if `recv()` raises and `ws_server.closing` is set;
  `send()` looks at `initial_response`. `close_connection_task` is one more task of its own.
- `ClientDisconnected` is an `OSError`, and a WebSocket's handler may raise it.
- A request's or WebSocket's task runs a coroutine `run_asgi()`, whose `self` has the `scope` and a `logger`; or a task
  factory has wrapped it.
- `Config.load()` imports the app, calls a factory, makes the TLS context, and may raise `SystemExit`. An app that looks
  like ASGI 3 is not wrapped. All else in a loaded Config comes from the options, from FORWARDED_ALLOW_IPS, from the
  logger's level, and from what `HTTP_PROTOCOLS` and `WS_PROTOCOLS` name. `ProxyHeadersMiddleware` has `app` and
  `trusted_hosts`; `LOGGING_CONFIG` has a handler `access`; `Server.limit_max_requests` has the jitter in it.
- Code that knows `uvicorn.Server` uses its `config`, `server_state`, `started`, `should_exit`, `force_exit`, `serve()`,
  `startup()` and `shutdown()`.

aioserve has its own lifespan, sockets, accepting and shutdown, waits on events where uvicorn has a tick, and installs
no signal handlers.
"""
