"""
The only readers of uvicorn's private parts. When uvicorn changes, this folder changes and nothing else.

What it relies on, in uvicorn 0.40 to 0.54 (a test names each of these, and says what breaks without it):

- The protocols are made with `config`, `server_state` and `app_state`. They put themselves into
  `server_state.connections` with `add()`, and out of it with `discard()` (HTTP) or `remove()` (WebSocket); an upgrade
  takes one out and puts another in. `server_state.tasks` holds a task for each request or WebSocket.
- HTTP protocols read their own `server_state.default_headers` at each request, and count up
  `server_state.total_requests` when a response is complete. In between there is `cycle`: with `scope`,
  `transport`, `default_headers`, `response_complete`, `more_body`, `disconnected`, `message_event`, `on_response` and
  `logger`. A protocol's `access_log` can be set, and `connections` is the state's.
- Their `timeout_keep_alive_task` is a timer after a response, and `None` again as soon as more bytes have arrived. A
  lost connection can leave it behind.
- Whether a part of a next request has arrived: httptools' `scope` and `pipeline` and h11's `conn.trailing_data` say so.
- Each protocol has `transport`, and `shutdown()`: it closes an idle connection, and a WebSocket with 1012, but one that
  is not accepted yet with a 500. `handshake_complete` says whether it is accepted.
- The legacy WebSocket protocol has a `handshake_completed_event` for that, and runs tasks of its own: `handler_task`
  and `close_connection_task`.
- A request's or WebSocket's task runs a coroutine `run_asgi()`, whose `self` has the `scope` and a `logger`.
- `Config.load()` imports the app, calls a factory, makes the TLS context, and may raise `SystemExit`. An app that looks
  like ASGI 3 is not wrapped. All else in a loaded Config comes from the options, from FORWARDED_ALLOW_IPS, from the
  logger's level, and from what `HTTP_PROTOCOLS` and `WS_PROTOCOLS` name. `ProxyHeadersMiddleware` has `app` and
  `trusted_hosts`; `LOGGING_CONFIG` has a handler `access`; `Server.limit_max_requests` has the jitter in it.
- Code that knows `uvicorn.Server` uses its `config`, `server_state`, `started`, `should_exit`, `force_exit`, `serve()`,
  `startup()` and `shutdown()`.

aioserve has its own lifespan, sockets, accepting and shutdown, waits on events where uvicorn has a tick, and installs
no signal handlers.
"""
