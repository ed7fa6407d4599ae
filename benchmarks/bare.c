/* Loads a model, decodes a prompt and says the likeliest tokens: the least that a program on llama.cpp can do.

       bare MODEL N_CTX N_THREADS GPU_LAYERS EXTRA_BUFFERS N_TOKENS ID...

   ID... is the prompt. The text goes to stdout, seconds of each part to stderr. */
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void say_nothing(enum ggml_log_level level, const char * text, void * data) {
    (void) level, (void) text, (void) data;
}

int main(int argc, char ** argv) {
    if (argc < 8) return 2;
    int n_tokens = atoi(argv[6]), n = argc - 7;
    double started = now();
    llama_log_set(say_nothing, NULL);
    llama_backend_init();

    struct llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = atoi(argv[4]);
    mp.use_extra_bufts = atoi(argv[5]);
    struct llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (!model) return 3;
    double loaded = now();

    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = atoi(argv[2]);
    cp.n_batch = cp.n_ubatch = 512;
    cp.n_threads = cp.n_threads_batch = atoi(argv[3]);
    struct llama_context * context = llama_init_from_model(model, cp);
    llama_token * ids = calloc(n, sizeof *ids);
    if (!context || !ids) return 4;
    double made = now();

    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    for (int i = 0; i < n; i++) ids[i] = atoi(argv[7 + i]);
    if (llama_decode(context, llama_batch_get_one(ids, n))) return 5;
    double read = now();
    for (int said = 1;; said++) {
        const float * logits = llama_get_logits_ith(context, -1);
        llama_token best = 0;
        for (int i = 1; i < llama_vocab_n_tokens(vocab); i++) {
            if (logits[i] > logits[best]) best = i;
        }
        char piece[256];
        int length = llama_token_to_piece(vocab, best, piece, sizeof piece, 0, false);
        fwrite(piece, 1, length > 0 ? length : 0, stdout);
        fflush(stdout);
        if (said == n_tokens) break;
        if (llama_decode(context, llama_batch_get_one(&best, 1))) return 5;
    }
    double answered = now();

    free(ids);
    llama_free(context);
    llama_model_free(model);
    fprintf(stderr, "{\"load\": %.4f, \"context\": %.4f, \"prompt\": %.4f, \"answer\": %.4f, \"free\": %.4f}\n",
            loaded - started, made - loaded, read - made, answered - read, now() - answered);
    return 0;
}
