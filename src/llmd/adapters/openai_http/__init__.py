"""An OpenAI-compatible HTTP edge over a `llmd.live.Server`.

    import uvicorn
    from llmd.adapters.openai_http import create_app
    app = create_app(server)
    await uvicorn.Server(uvicorn.Config(app, port=8000)).serve()

Needs the extra `http`.
"""

from .app import create_app

__all__ = ["create_app"]
