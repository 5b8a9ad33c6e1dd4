"""The fifty-one papers of the reading list, in its order. Pure data; what is built and what was found is elsewhere.

The list: Eugene Yan, "Language Modeling Reading List (to Start Your Paper Club)", 2024,
https://eugeneyan.com/writing/llm-reading-list/. Its gists are his; those here are our own.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = {
    "A": "The Transformer and its pretraining",
    "B": "Scale, kernels, architecture",
    "C": "Tuning and alignment",
    "D": "Data that models make",
    "E": "Retrieval",
    "F": "Safety, agents, products",
    "G": "Seeing, hearing, drawing",
}


@dataclass(frozen=True)
class Row:
    """One paper: its place in the list, what it is called here, who wrote it, where it is, what it says."""

    number: int
    slug: str
    group: str  # a key of GROUPS
    authors: str
    year: int
    source: str  # an arXiv number, or an address where there is none
    title: str
    gist: str

    @property
    def url(self) -> str:
        """Where to read it."""
        return self.source if self.source.startswith("https://") else f"https://arxiv.org/abs/{self.source}"

    @property
    def citation(self) -> str:
        """Authors, year, title and source in one line.

        >>> PAPERS[18].citation
        'Press et al. (2021). Train Short, Test Long: ... Length Extrapolation. arXiv:2108.12409'
        """
        where = self.source if self.source.startswith("https://") else f"arXiv:{self.source}"
        return f"{self.authors} ({self.year}). {self.title}. {where}"


# fmt: off
PAPERS = (
    Row(1, "attention", "A", "Vaswani et al.", 2017, "1706.03762",
        "Attention Is All You Need",
        "Sequences can be translated by attention alone, with no recurrence and no convolution"),
    Row(2, "gpt", "A", "Radford et al.", 2018,
        "https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf",
        "Improving Language Understanding by Generative Pre-Training",
        "A decoder taught to predict text first needs few labels for the tasks after it"),
    Row(3, "bert", "A", "Devlin et al.", 2018, "1810.04805",
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        "An encoder that fills blanks from both sides understands more than a left-to-right reader"),
    Row(4, "t5", "A", "Raffel et al.", 2019, "1910.10683",
        "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        "Every task becomes text in, text out; an encoder-decoder restoring spans does it best"),
    Row(5, "gpt2", "A", "Radford et al.", 2019,
        "https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf",
        "Language Models are Unsupervised Multitask Learners",
        "Enough varied text teaches tasks that nobody labelled"),
    Row(6, "gpt3", "A", "Brown et al.", 2020, "2005.14165",
        "Language Models are Few-Shot Learners",
        "A few examples in the prompt stand in for fine-tuning, the more so the larger the model"),
    Row(7, "scaling_laws", "A", "Kaplan et al.", 2020, "2001.08361",
        "Scaling Laws for Neural Language Models",
        "Loss falls as a power of parameters, data and compute; spend new compute mostly on size"),
    Row(8, "chinchilla", "A", "Hoffmann et al.", 2022, "2203.15556",
        "Training Compute-Optimal Large Language Models",
        "Parameters and tokens should grow in equal measure; the big models were starved of data"),
    Row(9, "llama", "A", "Touvron et al.", 2023, "2302.13971",
        "LLaMA: Open and Efficient Foundation Language Models",
        "A smaller model trained longer, on public data, is the better one to run"),
    Row(10, "instructgpt", "C", "Ouyang et al.", 2022, "2203.02155",
        "Training language models to follow instructions with human feedback",
        "Demonstrations, ranked answers and PPO make a small model preferred to a huge raw one"),
    Row(11, "lora", "C", "Hu et al.", 2021, "2106.09685",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "Fine-tuning moves weights within a very low rank, so train only that"),
    Row(12, "qlora", "C", "Dettmers et al.", 2023, "2305.14314",
        "QLoRA: Efficient Finetuning of Quantized LLMs",
        "Adapters over a base frozen in four bits tune as well as sixteen bits do"),
    Row(13, "dpr", "E", "Karpukhin et al.", 2020, "2004.04906",
        "Dense Passage Retrieval for Open-Domain Question Answering",
        "Two encoders trained on question-passage pairs find answers that word overlap misses"),
    Row(14, "rag", "E", "Lewis et al.", 2020, "2005.11401",
        "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks",
        "A generator that reads retrieved passages knows facts that can be swapped without training"),
    Row(15, "retro", "E", "Borgeaud et al.", 2021, "2112.04426",
        "Improving language models by retrieving from trillions of tokens",
        "Cross-attention to neighbours of each chunk buys what many more parameters would"),
    Row(16, "internet_augmented", "E", "Lazaridou et al.", 2022, "2203.05115",
        "Internet-augmented language models through few-shot prompting for open-domain question answering",
        "Search results in a few-shot prompt, and reranked answers, make small models well informed"),
    Row(17, "hyde", "E", "Gao et al.", 2022, "2212.10496",
        "Precise Zero-Shot Dense Retrieval without Relevance Labels",
        "Embed an invented answer instead of the question and the true one is found nearby"),
    Row(18, "flash_attention", "B", "Dao et al.", 2022, "2205.14135",
        "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        "Exact attention in tiles moves far fewer bytes and keeps memory linear in length"),
    Row(19, "alibi", "A", "Press et al.", 2021, "2108.12409",
        "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        "A penalty linear in distance replaces position embeddings and survives longer inputs"),
    Row(20, "codex", "D", "Chen et al.", 2021, "2107.03374",
        "Evaluating Large Language Models Trained on Code",
        "Models tuned on code write working functions, judged by running them k times"),
    Row(21, "layer_norm", "A", "Ba et al.", 2016, "1607.06450",
        "Layer Normalization",
        "Normalising over the features of each example steadies recurrent nets at any batch size"),
    Row(22, "pre_ln", "A", "Xiong et al.", 2020, "2002.04745",
        "On Layer Normalization in the Transformer Architecture",
        "Normalising before each sublayer tames the gradients, and warm-up becomes needless"),
    Row(23, "ppo", "C", "Schulman et al.", 2017, "1707.06347",
        "Proximal Policy Optimization Algorithms",
        "Clipping the probability ratio keeps policy steps safe with plain gradient descent"),
    Row(24, "wizardcoder", "C", "Luo et al.", 2023, "2306.08568",
        "WizardCoder: Empowering Code Large Language Models with Evol-Instruct",
        "Instructions rewritten to be harder make better training data for code"),
    Row(25, "llama2", "C", "Touvron et al.", 2023, "2307.09288",
        "Llama 2: Open Foundation and Fine-Tuned Chat Models",
        "Rounds of rejection sampling and PPO under two reward models make an open chat model"),
    Row(26, "rwkv", "B", "Peng et al.", 2023, "2305.13048",
        "RWKV: Reinventing RNNs for the Transformer Era",
        "One layer trains in parallel like attention and runs like an RNN with a constant state"),
    Row(27, "constitutional_ai", "C", "Bai et al.", 2022, "2212.08073",
        "Constitutional AI: Harmlessness from AI Feedback",
        "Written principles and a model's own critiques replace human labels of harm"),
    Row(28, "moe", "B", "Shazeer et al.", 2017, "1701.06538",
        "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        "A noisy gate picks a few of many experts: capacity grows, compute per token does not"),
    Row(29, "clip", "G", "Radford et al.", 2021, "2103.00020",
        "Learning Transferable Visual Models From Natural Language Supervision",
        "Matching images with their captions yields classifiers for labels never trained on"),
    Row(30, "vit", "G", "Dosovitskiy et al.", 2020, "2010.11929",
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        "Patches read as words: with enough images a plain Transformer beats convolutions"),
    Row(31, "generative_agents", "F", "Park et al.", 2023, "2304.03442",
        "Generative Agents: Interactive Simulacra of Human Behavior",
        "Memory, reflection and plans make prompted agents live believable days together"),
    Row(32, "hallucination_ood", "D", "Yan", 2023, "https://eugeneyan.com/writing/finetuning/",
        "Out-of-Domain Finetuning to Bootstrap Hallucination Detection",
        "Tuning on another domain's labels first makes a few own ones suffice to spot inventions"),
    Row(33, "dpo", "C", "Rafailov et al.", 2023, "2305.18290",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Preferences train the policy by one classification loss, with no reward model and no RL"),
    Row(34, "consistency", "G", "Song et al.", 2023, "2303.01469",
        "Consistency Models",
        "A net that maps any point of a diffusion path to its start draws in one or two steps"),
    Row(35, "lcm", "G", "Luo et al.", 2023, "2310.04378",
        "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        "Consistency distilled in an autoencoder's latents draws from text in four steps"),
    Row(36, "lcm_lora", "G", "Luo et al.", 2023, "2311.05556",
        "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module",
        "Speed learnt as an adapter can be added to any style adapter without training"),
    Row(37, "chain_of_note", "E", "Yu et al.", 2023, "2311.09210",
        "Chain-of-Note: Enhancing Robustness in Retrieval-Augmented Language Models",
        "Taking a note on each passage first guards the answer from noise and lets it say unknown"),
    Row(38, "emergent", "B", "Wei et al.", 2022, "2206.07682",
        "Emergent Abilities of Large Language Models",
        "Some abilities are absent in small models and appear abruptly in large ones"),
    Row(39, "q_transformer", "C", "Chebotar et al.", 2023, "2309.10150",
        "Q-Transformer: Scalable Offline Reinforcement Learning via Autoregressive Q-Functions",
        "Action dimensions as tokens let a Transformer learn Q-values from mixed offline data"),
    Row(40, "llama_guard", "F", "Inan et al.", 2023, "2312.06674",
        "Llama Guard: LLM-based Input-Output Safeguard for Human-AI Conversations",
        "A tuned model classifies prompts and answers by a policy that stands in its prompt"),
    Row(41, "rest_em", "C", "Singh et al.", 2023, "2312.06585",
        "Beyond Human Data: Scaling Self-Training for Problem-Solving with Language Models",
        "Training on one's own answers that pass a check beats training on human ones"),
    Row(42, "moe_explained", "B", "Sanseviero et al.", 2023, "https://huggingface.co/blog/moe",
        "Mixture of Experts Explained",
        "How sparse experts are routed, balanced and served, from Switch to Mixtral"),
    Row(43, "spin", "C", "Chen et al.", 2024, "2401.01335",
        "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
        "Telling one's own last answers from the human ones, round after round, needs no new labels"),
    Row(44, "self_instruct", "D", "Wang et al.", 2022, "2212.10560",
        "Self-Instruct: Aligning Language Models with Self-Generated Instructions",
        "From a few seed tasks a model writes, filters and learns from its own instructions"),
    Row(45, "pythia", "A", "Biderman et al.", 2023, "2304.01373",
        "Pythia: A Suite for Analyzing Large Language Models Across Training and Scaling",
        "Many sizes, many checkpoints, one data order: learning becomes an experiment"),
    Row(46, "self_rewarding", "C", "Yuan et al.", 2024, "2401.10020",
        "Self-Rewarding Language Models",
        "One model writes the answers and judges them, and both skills improve by turns"),
    Row(47, "copilot", "F", "Parnin et al.", 2023, "2312.14231",
        "Building Your Own Product Copilot: Challenges, Opportunities, and Needs",
        "What engineers lack around prompts: versions, tests, budgets, guard rails, telemetry"),
    Row(48, "matryoshka", "E", "Kusupati et al.", 2022, "2205.13147",
        "Matryoshka Representation Learning",
        "One embedding whose every prefix is itself a good embedding"),
    Row(49, "serving_survey", "B", "Miao et al.", 2023, "2312.15234",
        "Towards Efficient Generative Large Language Model Serving: A Survey from Algorithms to Systems",
        "Batching, caches, speculation and low precision: what makes answering cheap"),
    Row(50, "synthetic_data", "D", "Yan", 2024, "https://eugeneyan.com/writing/synthetic/",
        "How to Generate and Use Synthetic Data for Finetuning",
        "Data distilled from a stronger model or from oneself, for each stage of tuning"),
    Row(51, "whisper", "G", "Radford et al.", 2022, "2212.04356",
        "Robust Speech Recognition via Large-Scale Weak Supervision",
        "Transcripts from the web in great number make recognition robust without tuning"),
)
# fmt: on
