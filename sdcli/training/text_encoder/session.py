"""`sdcli train-text-encoder` from its settings to a task: captions, vocabulary, network and teacher."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from sdcli.encoders.clip import ClipTextConfig, ClipTextEncoder
from sdcli.encoders.tokenizer import ClipTokenizer
from sdcli.errors import UsageError
from sdcli.models.loaded_model import LoadedModel
from sdcli.training.events import Event, Preparation, RunNote
from sdcli.training.inputs.encoding import cut_captions
from sdcli.training.memory import Activations, forecast
from sdcli.training.model_parts import ModelFiles, load_to_train, tokenizers_of
from sdcli.training.origin import origin
from sdcli.training.session import RunSetup, Session, fingerprint
from sdcli.training.settings import cache_folder
from sdcli.training.text_encoder.caption_files import Captions, read_captions
from sdcli.training.text_encoder.network import copy_text_encoder, new_text_encoder
from sdcli.training.text_encoder.settings import TextSettings
from sdcli.training.text_encoder.task import TextEncoderTask, parse_objectives
from sdcli.training.text_encoder.teachers import TeacherVectors, open_teacher
from sdcli.training.text_encoder.vocabulary import train_vocabulary


class TextSession(Session[TextSettings]):
    """See `Session`."""

    command: ClassVar[str] = "train-text-encoder"
    kind: ClassVar[type[TextSettings]] = TextSettings

    def build(self) -> Generator[Event, None, RunSetup]:
        settings = self.settings
        objectives = parse_objectives(settings.objective, teacher=settings.teacher is not None)
        if self._checkpoint is None and "distil" not in objectives and "temperature" in settings.given():
            raise UsageError("--temperature has no effect without --objective distil")
        captions = read_captions(
            self.data,
            caption_column=settings.caption_column,
            caption_extension=settings.caption_extension,
            split=settings.split,
        )
        if captions.dropped:
            examples = "; ".join(f"{one.name}: {one.reason}" for one in captions.dropped[:3])
            yield RunNote(f"{len(captions.dropped):,} captions are not used ({examples})")
        yield Preparation("learning the vocabulary" if settings.model is None else "loading the model", 0)
        model, encoder, tokenizer = self._network(captions)
        note = cut_captions(((repr(text[:40]), text) for text in captions.texts), tokenizer)
        if note:
            yield RunNote(note)
        teacher = yield from self._teacher(captions)
        task = TextEncoderTask(
            captions=captions,
            tokenizer=tokenizer,
            encoder=encoder,
            objectives=objectives,
            batch=self.batch,
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            vectors=teacher.vectors(captions.texts) if teacher is not None else None,
            validation_split=settings.validation_split,
            word_dropout=settings.word_dropout,
            temperature=settings.temperature,
            pretrained=model is not None,
        )
        trained = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
        files = ModelFiles.around(model, trained=trained, averaged=("text_encoder",) if settings.use_ema else ())
        parameters = sum(p.numel() for network in task.networks.values() for p in network.parameters())
        width = encoder.config.hidden_size
        return RunSetup(
            task=task,
            samples=len(task.order),
            links=files.links(),
            write_frozen=files.write,
            origin=origin({"model": model}, {"teacher": teacher.identity if teacher is not None else None}),
            memory=forecast(
                task.networks.values(),
                settings,
                Activations(
                    settings.train_batch_size * tokenizer.max_length * width * 4 * 30 * encoder.config.num_hidden_layers
                ),
                frozen=() if task.original is None else (task.original,),
            ),
            facts={
                "data": self.data,
                "captions": len(captions.texts),
                "dropped": len(captions.dropped),
                "held_out": len(task.held_out),
                "vocabulary": encoder.config.vocab_size,
                "trained_parameters": parameters,
                "data_fingerprint": fingerprint({str(place): text for place, text in enumerate(captions.texts)}),
                "groups_fingerprint": fingerprint({"groups": captions.groups}),
            },
        )

    def _network(self, captions: Captions) -> tuple[LoadedModel | None, ClipTextEncoder, ClipTokenizer]:
        """The base model (None when training from random weights), the text encoder to train, and the tokenizer."""
        settings = self.settings
        if settings.model is not None:
            model = load_to_train(self.registry.find(settings.model), self.command, device="cpu", needs="text_encoder")
            (tokenizer,) = tokenizers_of(model)
            return model, copy_text_encoder(model.text_encoder, tokenizer), tokenizer
        tokenizer = train_vocabulary(captions.texts, size=settings.vocab_size, max_length=settings.max_length)
        config = ClipTextConfig(
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            intermediate_size=settings.intermediate_size or 4 * settings.hidden_size,
        )
        return None, new_text_encoder(config, tokenizer, seed=settings.seed), tokenizer

    def _teacher(self, captions: Captions) -> Generator[Event, None, TeacherVectors | None]:
        """The teacher's vectors with those of the captions, from the cache, which the first process fills."""
        settings = self.settings
        if settings.teacher is None:
            return None
        with self.accelerator.main_process_first():
            teacher = open_teacher(settings.teacher.expanduser(), device=self.accelerator.device)
            vectors = TeacherVectors.of(teacher, cache_folder(settings.cache_dir) / "teachers")
            for done, total in vectors.compute(teacher, captions.texts):
                yield Preparation("computing the teacher's vectors", done, total)
        return vectors
