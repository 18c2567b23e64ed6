"""`distillation` : la formule de Hinton, à la lettre ; un élève de toutes les couches est le maître."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llama import distillation
from llama.config import Config, LlamaError, TrainingConfig
from llama.data import Examples, question_examples
from llama.distillation import soft_target_loss, soft_targets, student_from, teacher_answers
from llama.lora import add_lora
from llama.model import LlamaModel
from llama.tokenization import SimpleCharTokenizer
from llama.training import mean_loss, next_token_loss, train

CONFIG = Config(vocab_size=32, d_model=16, n_layers=6, n_heads=4, n_kv_heads=2, d_ff=24, block_size=12)


def model(seed=0, config=CONFIG, std=0.2) -> LlamaModel:
    torch.manual_seed(seed)
    network = LlamaModel(config)
    for parameter in network.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=std)
    return network.eval()


def examples(n=4, seed=0) -> Examples:
    ids = torch.randint(32, (n, 12), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, dims=1)
    labels[::2, :5] = -100  # des longueurs inégales, pour que la normalisation compte
    return Examples(ids, labels, torch.ones_like(ids))


def gradients(network, value):
    network.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def naive(student, batch, teacher, temperature, alpha):
    """La formule, écrite d’un trait sur les logits entiers."""
    learnt = batch.labels != -100
    with torch.no_grad():
        target = teacher(batch.ids)[learnt] / temperature
    logits = student(batch.ids)[learnt]
    soft = F.kl_div((logits / temperature).log_softmax(-1), target.softmax(-1), reduction="sum")
    hard = F.cross_entropy(logits, batch.labels[learnt], reduction="sum")
    return alpha * temperature**2 * soft + (1 - alpha) * hard


# La perte


@pytest.mark.parametrize("block", [1, 32 * 5, 1 << 22])
@pytest.mark.parametrize("temperature, alpha", [(1.0, 1.0), (2.0, 0.5), (5.0, 0.9), (0.5, 0.1)])
def test_same_loss_and_gradients_as_pytorch(monkeypatch, block, temperature, alpha):
    """Quel que soit le découpage : un jeton à la fois, cinq, ou tous."""
    monkeypatch.setattr(distillation, "BLOCK", block)
    teacher, student, batch = model(1), model(2), examples()
    expected = naive(student, batch, teacher, temperature, alpha)
    value = soft_target_loss(student, batch, teacher=teacher, temperature=temperature, alpha=alpha)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(student, 0.1 * value), gradients(student, 0.1 * expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999), n=st.integers(1, 6), size=st.integers(2, 20), temperature=st.floats(0.1, 50),
    scale=st.floats(0.01, 20),
)
def test_soft_part_is_a_divergence(seed, n, size, temperature, scale):
    """Positive, nulle si les logits ne diffèrent que d’une constante, égale à la somme écrite à la main."""
    generator = torch.Generator().manual_seed(seed)
    logits, target = scale * torch.randn(2, n, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(size, (n,), generator=generator)
    value = soft_targets(logits, target, labels, temperature, 1.0)
    log_p, log_q = (target / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    by_hand = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(value.double(), by_hand, rtol=1e-4, atol=2e-6 * n * temperature**2)
    assert value >= -2e-6 * n * temperature**2
    shifted = soft_targets(target + 3, target, labels, temperature, 1.0)
    assert abs(float(shifted)) < 1e-5 * temperature**2 * n * size


def test_alpha_zero_is_the_plain_loss():
    teacher, student, batch = model(1), model(2), examples()
    plain = next_token_loss(student, batch)
    value = soft_target_loss(student, batch, teacher=teacher, alpha=0.0)
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)
    ours, theirs = gradients(student, value), gradients(student, plain)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


def test_a_perfect_student_has_nothing_to_learn():
    teacher, batch = model(1), examples()
    value = soft_target_loss(model(1), batch, teacher=teacher, alpha=1.0)
    assert abs(value.item()) < 1e-5
    student = model(1)
    perfect = gradients(student, soft_target_loss(student, batch, teacher=teacher, alpha=1.0))
    student = model(2)
    ordinary = gradients(student, soft_target_loss(student, batch, teacher=teacher, alpha=1.0))
    for name in perfect:
        assert perfect[name].norm() < 1e-5 * ordinary[name].norm(), name


def test_high_temperature_matches_centred_logits():
    """T → ∞ : la perte tend vers Σ (zᵢ − vᵢ)² / 2V, logits centrés (Hinton et al. 2015, §2.1)."""
    logits, target = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    z, v = logits - logits.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
    limit = (z - v).square().sum() / (2 * 32)
    labels = torch.zeros(7, dtype=torch.int64)
    gaps = [abs(float(soft_targets(logits, target, labels, T, 1.0) / limit) - 1) for T in (2.0, 8.0, 32.0)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.03


def test_masked_tokens_do_not_count():
    teacher, student = model(1), model(2)
    batch = examples()
    expected = soft_target_loss(student, batch, teacher=teacher)
    altered = batch.ids.clone()
    altered[0, -1] = (altered[0, -1] + 1) % 32
    masked = batch.labels.clone()
    masked[0, -1] = -100
    first = soft_target_loss(student, Examples(batch.ids, masked, batch.mask), teacher=teacher)
    second = soft_target_loss(student, Examples(altered, masked, batch.mask), teacher=teacher)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    assert first < expected


def test_documents_of_a_block_are_kept_apart():
    """Le masque va aux deux modèles : un bloc de deux documents vaut les deux documents."""
    teacher, student, batch = model(1), model(2), examples(2)
    labels = batch.labels.clone()
    labels[:, -1] = -100
    mask = torch.cat([torch.ones(1, 12), torch.full((1, 12), 2)], dim=1).long()
    block = Examples(batch.ids.reshape(1, -1), labels.reshape(1, -1), mask)
    apart = soft_target_loss(student, Examples(batch.ids, labels, batch.mask), teacher=teacher)
    torch.testing.assert_close(soft_target_loss(student, block, teacher=teacher), apart, rtol=1e-4, atol=1e-4)


def test_evaluation_computes_no_gradient(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    loss = partial(soft_target_loss, teacher=model(1))
    assert mean_loss(model(2), examples(), loss=loss) > 0


class NewTensors(TorchDispatchMode):
    """Note la taille du plus grand tenseur créé, hors ceux qui réutilisent la mémoire de `known`."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.largest = {tensor.data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.data_ptr() not in self.known:
            self.largest = max(self.largest, out.numel())
        return out


def test_no_other_tensor_as_large_as_the_logits(monkeypatch):
    """Le gradient prend la place des logits du maître : la perte n’ajoute que des blocs."""
    monkeypatch.setattr(distillation, "BLOCK", 4096)
    logits, target = torch.randn(256, 512), torch.randn(256, 512)
    logits.requires_grad_()
    labels = torch.randint(512, (256,))
    with NewTensors(logits, target) as created:
        value = distillation._ByBlocks.apply(logits, target, labels, 2.0, 0.5)
        (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.data_ptr() == target.data_ptr() and 0 < created.largest <= 4096


def test_student_approaches_its_teacher():
    """L’entraînement rapproche les distributions, et le maître reste ce qu’il était."""
    teacher = model(1)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = student_from(teacher, 2)
    loss = partial(soft_target_loss, teacher=teacher, alpha=1.0)
    settings = TrainingConfig(steps=60, batch_size=8, learning_rate=5e-3)
    history = train(student, examples(8), settings, loss=loss, progress=False)
    assert history.losses[-1] < history.losses[0] / 5
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())


def test_bf16_is_close_to_float32():
    teacher, student, batch = model(1), model(2), examples()
    exact = soft_target_loss(student, batch, teacher=teacher)
    with torch.autocast("cpu", torch.bfloat16):
        rough = soft_target_loss(student, batch, teacher=teacher)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)


# Les réponses du maître


@pytest.fixture
def tokenizer():
    return SimpleCharTokenizer.train(["Quelle durée ? Oui, non : 12345 semaines."])


QUESTIONS = ["Quelle durée ?", "Oui ?", "non ?"]


def scripted(tokenizer, answers, calls):
    """Un maître dont on connaît les réponses, coupées comme le ferait `generate`."""
    def generate(teacher, prompts, *, max_new_tokens, eos_id, **sampling):
        calls.append((prompts, eos_id, sampling))
        return [tokenizer.encode(answers[tuple(prompt)])[:max_new_tokens] for prompt in prompts]
    return generate


def prompt(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tuple(tokenizer.encode_chat(messages, add_generation_prompt=True)[0])


def ask(tokenizer, *answers, **options):
    calls = []
    script = {prompt(tokenizer, q): a for q, a in zip(QUESTIONS, answers, strict=True)}
    options = {"max_new_tokens": 12, "batch_size": 2, "progress": False} | options
    generate = scripted(tokenizer, script, calls)
    return teacher_answers(None, tokenizer, QUESTIONS, generate=generate, **options), calls


def test_answers_become_pairs_in_order(tokenizer):
    pairs, calls = ask(tokenizer, "Oui, 5.", " non ", "1 semaine", temperature=0.7)
    assert pairs == [("Quelle durée ?", "Oui, 5."), ("Oui ?", "non"), ("non ?", "1 semaine")]
    assert [len(prompts) for prompts, _, _ in calls] == [2, 1]
    assert all(eos == tokenizer.eos_id and sampling == {"temperature": 0.7} for _, eos, sampling in calls)
    batch = question_examples(pairs, tokenizer, 48)
    learnt = [tokenizer.decode(row[row != -100].tolist(), skip_special_tokens=True) for row in batch.labels]
    assert learnt == ["Oui, 5.", "non", "1 semaine"]


def test_empty_and_cut_answers_are_left_out(tokenizer, capsys):
    pairs, _ = ask(tokenizer, "  ", "Oui", "Oui, oui, oui, oui, oui", max_new_tokens=12)
    assert pairs == [("Oui ?", "Oui")]
    assert capsys.readouterr().err == "2 réponses sur 3, vides ou coupées, omises.\n"


def test_a_real_teacher_answers(tokenizer):
    """Avec le vrai `generate` : un maître entraîné sur une question y répond, et l’élève l’apprend de lui."""
    pairs = [("Quelle durée ?", "12 semaines."), ("Oui ?", "non.")]
    config = CONFIG.replace(vocab_size=tokenizer.vocab_size, n_layers=2, block_size=40)
    teacher = model(1, config, std=0.02)
    data = question_examples(pairs, tokenizer, 40)
    train(teacher, data, TrainingConfig(steps=120, batch_size=2, learning_rate=1e-2), progress=False)
    questions = [question for question, _ in pairs]
    assert teacher_answers(teacher, tokenizer, questions, max_new_tokens=20, progress=False) == pairs


# L’élève taillé dans le maître


MOE = CONFIG.replace(num_local_experts=3, moe_layers=(1, 3, 5), nope_layers=(2, 5), tie_word_embeddings=False)


@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(tie_word_embeddings=False), MOE])
def test_student_of_all_layers_is_the_teacher(config):
    teacher = model(1, config)
    student = student_from(teacher, config.n_layers)
    assert student.config == config
    ids = examples().ids
    assert torch.equal(student(ids), teacher(ids))
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert not pointers & {p.data_ptr() for p in student.parameters()}
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("n, kept", [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_layers_are_spread_from_first_to_last(n, kept):
    teacher, ids = model(1), examples().ids
    student = student_from(teacher, n)
    assert student.config.n_layers == n
    assert torch.equal(student(ids), student_from(teacher, kept)(ids))
    for layer, old in zip(student.layers, kept, strict=True):
        for mine, theirs in zip(layer.parameters(), teacher.layers[old].parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_special_layers_keep_their_nature():
    """Une couche à experts, ou sans RoPE, le reste sous son nouveau numéro."""
    student = student_from(model(1, MOE), [1, 2, 5])
    assert student.config.moe_layers == (0, 2) and student.config.nope_layers == (1, 2)
    assert student_from(model(1, MOE), [0, 2]).config.moe_layers == ()


def test_student_generates_with_a_cache():
    """Le numéro de chaque couche dans le cache est le nouveau."""
    student = student_from(model(1), [1, 4])
    tokens = distillation.generate(student, [[1, 2, 3]], max_new_tokens=5)[0]
    greedy = [1, 2, 3]
    for _ in range(5):
        greedy.append(int(student(torch.tensor([greedy]))[0, -1].argmax()))
    assert tokens == greedy[3:]


# Ce qui est refusé


def other_vocabulary():
    return model(1, CONFIG.replace(vocab_size=33))


def with_adapter():
    teacher = model(1)
    add_lora(teacher, 2, 4, ["q_proj"])
    return teacher


def loss(**options):
    return lambda _: soft_target_loss(model(2), examples(), **{"teacher": model(1)} | options)


MISUSES = {
    "vocabulaires": (lambda t: loss(teacher=other_vocabulary())(t), "L’élève a 32 jetons et le maître 33"),
    "température nulle": (loss(temperature=0.0), "est un nombre strictement positif (reçu : 0.0)"),
    "température négative": (loss(temperature=-2.0), "(reçu : -2.0)"),
    "température infinie": (loss(temperature=float("inf")), "(reçu : inf)"),
    "température indéfinie": (loss(temperature=float("nan")), "(reçu : nan)"),
    "alpha négatif": (loss(alpha=-0.1), "est entre 0 et 1 (reçu : -0.1)"),
    "alpha au-delà": (loss(alpha=1.5), "est entre 0 et 1 (reçu : 1.5)"),
    "couche absente": (lambda _: student_from(model(), [0, 6]), "[6] ; le maître a les couches 0 à 5"),
    "couche négative": (lambda _: student_from(model(), [-1]), "Couches à garder : [-1]"),
    "aucune couche": (lambda _: student_from(model(), []), "Couches à garder : aucune"),
    "zéro couche": (lambda _: student_from(model(), 0), "entre 1 et 6 couches du maître (reçu : 0)"),
    "trop de couches": (lambda _: student_from(model(), 7), "entre 1 et 6 couches du maître (reçu : 7)"),
    "maître adapté": (lambda _: student_from(with_adapter(), 2), "Le maître porte des adaptateurs"),
    "sans question": (lambda t: teacher_answers(None, t, []), "questions est une liste non vide"),
    "question seule": (lambda t: teacher_answers(None, t, "Oui ?"), "questions est une liste non vide"),
    "lot vide": (lambda t: teacher_answers(None, t, ["Oui ?"], batch_size=0), "batch_size est un entier"),
    "réponses coupées": (lambda t: ask(t, *["Oui, oui"] * 3, max_new_tokens=3), "augmentez max_new_tokens"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_named(tokenizer, name):
    action, cause = MISUSES[name]
    with pytest.raises(LlamaError) as error:
        action(tokenizer)
    message = str(error.value).replace("\u00a0", " ")
    assert cause in message and "\n" not in message
