"""Loading SAELens-style classes that SAELens's registry does not know."""

from __future__ import annotations

from typing import Any, ClassVar

from sae_lens.saes.sae import SAEConfig

from saelens_certify.errors import CertifyError


class SelfLoading:
    """Mixin that lets a class load what it saved: ``Class.load_from_disk(folder)``.

    SAELens looks classes up by architecture in a table that the whole process shares. A class
    that answers for itself needs no entry there, so loading a checkpoint changes nothing for the
    rest of the user's program. Whoever wants ``SAE.load_from_disk`` to know the class too calls
    `saelens_certify.saes.classes.register_with_sae_lens`.

    Attributes:
        config_class: The class of ``cfg``.
    """

    config_class: ClassVar[type[SAEConfig]]

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> Any:
        """Return this class, which is the only one it can load."""
        if architecture != cls.config_class.architecture():
            raise CertifyError(
                f"{cls.__name__} loads architecture {cls.config_class.architecture()!r}, the folder "
                f"holds {architecture!r}; load it with saelens_certify or sae_lens.SAE"
            )
        return cls

    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        """Return this class's configuration."""
        cls.get_sae_class_for_architecture(architecture)
        return cls.config_class

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """Create an SAE with fresh weights from a configuration."""
        return cls(cls.config_class.from_dict(config_dict))  # pyright: ignore[reportCallIssue]

    def fold_W_dec_norm(self) -> None:  # noqa: N802 (SAELens's name)
        """Refuse: rescaling features changes which of them are selected.

        Raises:
            NotImplementedError: Always, as SAELens's TopK, temporal and matching-pursuit classes do.
        """
        raise NotImplementedError(  # a refusal, not a gap: callers of SAELens's classes catch this type
            f"folding decoder norms would change which features {type(self).__name__} selects; use the SAE "
            "as it is"
        )
