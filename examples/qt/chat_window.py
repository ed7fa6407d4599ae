"""The window of both examples: a conversation, what the guard did to each answer, and a line to write in.

It knows a `Backend` and nothing of acd_local. Colours are the palette's alone, so that it is dark where the system is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from PySide6.QtCore import QEvent, QObject, QRectF, QSize, Qt, Signal
from PySide6.QtGui import (
    QFont,
    QKeyEvent,
    QKeySequence,
    QPainter,
    QPaintEvent,
    QPalette,
    QShortcut,
    QTextBlockFormat,
    QTextCharFormat,
    QTextCursor,
)
from PySide6.QtWidgets import (
    QFrame,
    QHBoxLayout,
    QLabel,
    QMainWindow,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QTextEdit,
    QVBoxLayout,
    QWidget,
)

Messages = list[dict[str, str]]
COLUMN = 720  # pixels: longer lines are hard to read
INTRO = (
    "Ask something. Where the guard changed a word of the answer, the word is underlined: point at it to read what the "
    "model would have said instead."
)


@dataclass(frozen=True)
class Token:
    """A token of the answer. `instead`: what the safe stream alone would have said; None: the same."""

    text: str
    instead: str | None


@dataclass(frozen=True)
class Done:
    """A finished answer: `changed` of its `positions` tokens were changed by the guard."""

    text: str
    cancelled: bool
    positions: int
    changed: int
    tokens_per_second: float


class Backend(QObject):
    """What answers. The window calls its methods in the window's thread; the signals may come from any."""

    loading = Signal(str, float)  # "check" or "model", and how far it is, from 0 to 1
    ready = Signal(str, str)  # model, prompt pair
    reading = Signal(float)  # how far a long prompt is, from 0 to 1
    gate = Signal(float, str, int)  # chance of harm, decision, from which token on
    token = Signal(Token)  # comes before the text that it is part of
    text = Signal(str)  # the next piece of the answer
    done = Signal(Done)  # the answer is finished, or cancelled
    failed = Signal(str)  # there is no answer, and why
    notice = Signal(str)  # something to know
    down = Signal(str)  # it cannot start, and why

    def start(self) -> None: ...

    def ask(self, messages: Messages) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class ChatWindow(QMainWindow):
    """A chat over a backend.

    Attributes:
        messages: the conversation so far; an answer joins it when it is done.
    """

    def __init__(self, backend: Backend, title: str) -> None:
        super().__init__()
        self.messages: Messages = []
        self._backend = backend
        self._question: str | None = None  # while it is being answered
        self._is_ready = False
        self._build(title)
        backend.loading.connect(self._on_loading)
        backend.ready.connect(self._on_ready)
        backend.reading.connect(self._on_reading)
        backend.gate.connect(self._on_gate)
        backend.token.connect(self._on_token)
        backend.text.connect(self._on_text)
        backend.done.connect(self._on_done)
        backend.failed.connect(self._on_failed)
        backend.notice.connect(self._on_notice)
        backend.down.connect(self._on_down)
        self._on_loading("model", 0.0)
        backend.start()

    def _build(self, title: str) -> None:
        self.setWindowTitle(title)
        self.resize(780, 680)
        self._model, self._pair = QLabel("Loading the model"), caption("")
        self._model.setFont(scaled(self._model.font(), 1.15, bold=True))
        self._progress = QProgressBar(textVisible=False, maximum=1000, maximumHeight=6)
        self._conversation = Conversation()
        intro = caption(INTRO, centred=True)
        intro.setForegroundRole(QPalette.ColorRole.PlaceholderText)
        self._conversation.add(intro)
        self.input = Input()
        self.input.sent.connect(self._on_button)
        self.button = QPushButton("Send", minimumHeight=self.input.height(), minimumWidth=88)
        self.button.clicked.connect(self._on_button)
        QShortcut(QKeySequence(Qt.Key.Key_Escape), self, activated=self._stop)

        row = QHBoxLayout()
        row.setSpacing(8)
        row.addWidget(self.input)
        row.addWidget(self.button, alignment=Qt.AlignmentFlag.AlignBottom)
        column = QVBoxLayout()
        column.setContentsMargins(20, 16, 20, 16)
        column.setSpacing(8)
        for widget in (self._model, self._pair, self._progress):
            column.addWidget(widget)
        column.addWidget(self._conversation, stretch=1)
        column.addLayout(row)
        middle = QWidget()
        middle.setLayout(column)
        self.setCentralWidget(middle)
        self.input.setFocus()

    # -- what the user does --------------------------------------------------------------------------------------------

    def _on_button(self) -> None:
        if self._question is not None:
            self._stop()
        elif self._is_ready and (question := self.input.toPlainText().strip()):
            self.input.clear()
            self.ask(question)

    def ask(self, question: str) -> None:
        """Send a question; it must be ready, and not answering."""
        self._question = question
        self._conversation.add(Bubble(question), right=True)
        self._answer = Answer()
        self._conversation.add(self._answer)
        self._show_state()
        self._backend.ask([*self.messages, {"role": "user", "content": question}])

    def _stop(self) -> None:
        if self._question is not None:
            self._backend.stop()

    def closeEvent(self, event: QEvent) -> None:
        self._backend.close()
        super().closeEvent(event)

    # -- what the backend says -----------------------------------------------------------------------------------------

    def _on_loading(self, phase: str, progress: float) -> None:
        self._is_ready = False
        self._model.setText("Checking the prompt pair on this model" if phase == "check" else "Loading the model")
        self._pair.setText(f"{progress:.0%}")
        self._progress.setValue(round(1000 * progress))
        self._progress.show()
        self._show_state()

    def _on_ready(self, model: str, pair: str) -> None:
        self._is_ready = True
        self._model.setText(model)
        self._pair.setText(pair)
        self._progress.hide()
        self._show_state()

    def _on_reading(self, progress: float) -> None:
        self._answer.status.setText(f"reading the conversation: {progress:.0%}")

    def _on_gate(self, probability: float, decision: str, position: int) -> None:
        self._answer.badge.show_gate(probability, decision, position)

    def _on_token(self, token: Token) -> None:
        self._answer.tokens.append(token)

    def _on_text(self, text: str) -> None:
        self._answer.add_text(text)

    def _on_done(self, done: Done) -> None:
        assert self._question is not None
        if done.text:
            self.messages += [
                {"role": "user", "content": self._question},
                {"role": "assistant", "content": done.text},
            ]
        changed, rate = f"{done.changed} of {done.positions} tokens changed", f"{done.tokens_per_second:.0f} tokens/s"
        self._end(f"{'stopped · ' if done.cancelled else ''}{changed} · {rate}")

    def _on_failed(self, why: str) -> None:
        """The conversation is as it was, and the question can be sent again."""
        if self.input.toPlainText() == "":
            self.input.insertPlainText(self._question)
        self._end("interrupted")
        self._on_notice(why)

    def _on_notice(self, text: str) -> None:
        self._conversation.add(caption(text, centred=True))

    def _on_down(self, why: str) -> None:
        self._is_ready = False
        self._model.setText("No model")
        self._pair.setText("")
        self._progress.hide()
        self._on_notice(why)
        self._show_state()

    def _end(self, status: str) -> None:
        self._question = None
        self._answer.status.setText(status)
        self._show_state()

    def _show_state(self) -> None:
        answering = self._question is not None
        self.button.setText("Stop" if answering else "Send")
        self.button.setEnabled(answering or self._is_ready)


class Conversation(QScrollArea):
    """What was said, one below the other. It follows its end unless the reader has scrolled up."""

    def __init__(self) -> None:
        super().__init__(widgetResizable=True, frameShape=QFrame.Shape.NoFrame)
        self._column = QVBoxLayout()
        self._column.setSpacing(16)
        self._column.addStretch(1)
        inner = QWidget(maximumWidth=COLUMN)
        inner.setLayout(self._column)
        outer, row = QWidget(), QHBoxLayout()
        row.addWidget(inner)
        outer.setLayout(row)
        outer.setBackgroundRole(QPalette.ColorRole.Base)
        self.setWidget(outer)
        self._follows = True
        self.verticalScrollBar().valueChanged.connect(self._note)
        self.verticalScrollBar().rangeChanged.connect(self._follow)

    def add(self, widget: QWidget, *, right: bool = False) -> None:
        side = Qt.AlignmentFlag.AlignRight if right else Qt.AlignmentFlag(0)
        self._column.insertWidget(self._column.count() - 1, widget, alignment=side)

    def _note(self, value: int) -> None:
        self._follows = value >= self.verticalScrollBar().maximum() - 4

    def _follow(self, _: int, maximum: int) -> None:
        if self._follows:
            self.verticalScrollBar().setValue(maximum)


class Bubble(QLabel):
    """A question."""

    def __init__(self, text: str) -> None:
        super().__init__(text, wordWrap=True, textFormat=Qt.TextFormat.PlainText)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.setFont(scaled(self.font(), 1.1))
        self.setContentsMargins(14, 9, 14, 9)
        self.setForegroundRole(QPalette.ColorRole.HighlightedText)

    def sizeHint(self) -> QSize:
        """A label that wraps would rather be narrow."""
        wide = (
            self.fontMetrics().boundingRect(0, 0, COLUMN - 200, 0, Qt.TextFlag.TextWordWrap, self.text()).width() + 30
        )
        return QSize(wide, self.heightForWidth(wide))

    def paintEvent(self, event: QPaintEvent) -> None:
        fill_round(self, QPalette.ColorRole.Highlight, QPalette.ColorRole.Highlight, 14)
        super().paintEvent(event)


class Badge(QLabel):
    """Whether the guard was at work, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.setContentsMargins(9, 2, 9, 3)
        self.setFont(scaled(self.font(), 0.9))
        self.setSizePolicy(QSizePolicy.Policy.Maximum, QSizePolicy.Policy.Fixed)
        self._on = False

    def show_gate(self, probability: float, decision: str, position: int) -> None:
        self._on = decision == "contrast"
        self.setForegroundRole(QPalette.ColorRole.HighlightedText if self._on else QPalette.ColorRole.Text)
        where = f" from token {position} on" if position else ""
        self.setText(f"guard {'on' if self._on else 'off'}{where} · chance of harm {probability:.0%}")
        self.setToolTip(f"The gate reads {probability:.2%}; answered by: {decision}")
        self.show()

    def paintEvent(self, event: QPaintEvent) -> None:
        inside = QPalette.ColorRole.Highlight if self._on else QPalette.ColorRole.Base
        outside = QPalette.ColorRole.Highlight if self._on else QPalette.ColorRole.PlaceholderText
        fill_round(self, inside, outside, self.height() / 2)
        super().paintEvent(event)


class Answer(QWidget):
    """One answer while it streams, and afterwards.

    Attributes:
        tokens: those that were told of and whose text has not come yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: deque[Token] = deque()
        self.text, self.badge, self.status = GrowingText(), Badge(), caption("reading the conversation")
        self.badge.hide()
        line = QHBoxLayout()
        line.setSpacing(10)
        line.addWidget(self.badge)
        line.addWidget(self.status, stretch=1)
        column = QVBoxLayout()
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(6)
        column.addWidget(self.text)
        column.addLayout(line)
        self.setLayout(column)

    def add_text(self, text: str) -> None:
        self.status.setText("answering")
        for part, instead in split(text, self.tokens):
            self.text.append_text(part, instead)


class GrowingText(QTextEdit):
    """Read-only text that is as high as it needs to be."""

    def __init__(self) -> None:
        super().__init__(readOnly=True, frameShape=QFrame.Shape.NoFrame)
        self.setFont(scaled(self.font(), 1.1))
        self.setAccessibleName("Answer")
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.viewport().setAutoFillBackground(False)
        self.document().setDocumentMargin(0)
        airy = QTextBlockFormat()
        airy.setLineHeight(120, QTextBlockFormat.LineHeightTypes.ProportionalHeight.value)
        QTextCursor(self.document()).setBlockFormat(airy)
        self.document().documentLayout().documentSizeChanged.connect(self._fit)
        self._fit()

    def _fit(self) -> None:
        self.setFixedHeight(math.ceil(self.document().size().height()))

    def append_text(self, text: str, instead: str | None) -> None:
        """Append plain text: what a model says is never read as HTML."""
        style, plain = QTextCharFormat(), QTextCharFormat()
        if instead is not None:
            style.setUnderlineStyle(QTextCharFormat.UnderlineStyle.SingleUnderline)
            style.setUnderlineColor(self.palette().color(QPalette.ColorRole.Link))
            style.setToolTip(f"Without the guard: {instead}" if instead else "Without the guard the answer ends here")
        cursor = QTextCursor(self.document())
        cursor.movePosition(QTextCursor.MoveOperation.End)
        word = text.lstrip(" ")
        cursor.insertText(text[: len(text) - len(word)], plain)
        cursor.insertText(word, style)


class Input(QPlainTextEdit):
    """Enter sends, Shift+Enter begins a new line."""

    sent = Signal()

    def __init__(self) -> None:
        super().__init__(placeholderText="Message", tabChangesFocus=True)
        self.setFont(scaled(self.font(), 1.1))
        self.document().setDocumentMargin(8)
        self.setAccessibleName("Message")
        self.textChanged.connect(self._fit)
        self._fit()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        enter = event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
        if enter and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
            self.sent.emit()
        else:
            super().keyPressEvent(event)

    def _fit(self) -> None:
        lines = min(max(round(self.document().size().height()), 1), 6)
        self.setFixedHeight(lines * self.fontMetrics().lineSpacing() + 20)


def split(text: str, tokens: deque[Token]) -> Iterator[tuple[str, str | None]]:
    """Cut a piece of an answer along its tokens, which are taken off the queue: (text, what would have stood there).

    Part of a character has no text of its own, so what a token says may not be found: such text goes with the first
    change among the tokens that are passed over.
    """
    while text:
        instead = None
        while tokens and not text.startswith(tokens[0].text):
            passed = tokens.popleft()
            instead = passed.instead if instead is None else instead
        if instead is None and tokens:
            token = tokens.popleft()
            length, instead = len(token.text), token.instead
        else:
            length = len(text)
        if length:
            yield text[:length], instead
        text = text[length:]


def caption(text: str, *, centred: bool = False) -> QLabel:
    """Make a small line."""
    label = QLabel(text, wordWrap=True, textFormat=Qt.TextFormat.PlainText)
    label.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    if centred:
        label.setAlignment(Qt.AlignmentFlag.AlignCenter)
        label.setContentsMargins(60, 0, 60, 0)
    return label


def scaled(font: QFont, factor: float, *, bold: bool = False) -> QFont:
    changed = QFont(font)
    changed.setPointSizeF(font.pointSizeF() * factor)
    changed.setBold(bold)
    return changed


def fill_round(widget: QWidget, inside: QPalette.ColorRole, outside: QPalette.ColorRole, radius: float) -> None:
    painter = QPainter(widget)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    painter.setPen(widget.palette().color(outside))
    painter.setBrush(widget.palette().color(inside))
    painter.drawRoundedRect(QRectF(widget.rect()).adjusted(0.5, 0.5, -0.5, -0.5), radius, radius)
