"""A hub of one folder per repository, in the place of the network, through the public functions of its client."""

import shutil
from types import SimpleNamespace

from huggingface_hub import HfApi

from fastm3ae import hub


def fake_hub(folder, monkeypatch):
    """Puts it there; returns the repositories that were made, as (name, private, token)."""
    made = []

    def create_repo(self, repo_id, *, private=None, exist_ok=False, **_):
        made.append((repo_id, private, self.token))
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, **_):
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/{commit_message}"

    def snapshot_download(repo_id, *, allow_patterns, **_):
        cache = folder / "cache" / repo_id
        cache.mkdir(parents=True, exist_ok=True)
        for path in (folder / repo_id).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return made
