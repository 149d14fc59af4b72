/* The C interface of the hst_trt host: opens a bundle (NAME.hstb), draws pictures from prompts, with no Python in the process.
 *
 * Every function that can fail returns `hst_error *`: NULL is success, anything else is the caller's to read and to free with
 * hst_error_free. On failure outputs are left NULL or zero. No function throws, exits or prints.
 *
 * Handles are opaque and freed by their own function, which takes NULL. Bundles and results never change once they are there, and may be
 * used by any number of threads at once; a pipeline draws for one thread at a time. A handle that was freed, or is of another kind, is
 * refused, unless its address was given out again. A pipeline keeps what it needs of its bundle, so the bundle may be freed first.
 *
 * Texts are UTF-8 and end with NUL. Sizes of arrays are counts of elements. This header is C99 and C++.
 *
 * A struct that the host fills in is set up by its init function, which notes how large the host's is; later versions add fields at the
 * end only, and a library takes the structs of every older minor version. Fields added after 1.0 say since when they are there.
 */
#ifndef HST_TRT_H
#define HST_TRT_H

#include <stddef.h>
#include <stdint.h>

/* A library serves hosts that were compiled against the same major and any minor up to its own. */
#define HST_API_VERSION_MAJOR 1
#define HST_API_VERSION_MINOR 1
#define HST_API_VERSION ((uint32_t)(HST_API_VERSION_MAJOR * 65536 + HST_API_VERSION_MINOR))

#if defined(__GNUC__)
#define HST_API __attribute__((visibility("default")))
#else
#define HST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct hst_error hst_error;
typedef struct hst_bundle hst_bundle;
typedef struct hst_pipeline hst_pipeline;
typedef struct hst_result hst_result;
typedef struct hst_loop hst_loop;

/* What kind of thing went wrong: the exit codes of the command line. */
enum {
  HST_INTERNAL = 1,     /* our own mistake */
  HST_REQUEST = 2,      /* an argument is not usable */
  HST_INCOMPATIBLE = 3, /* two things that are both fine do not fit each other */
  HST_MISSING = 4,      /* a bundle, library or device is not there */
  HST_RESOURCE = 5,     /* out of memory or disk */
  HST_INTEGRITY = 6,    /* a file is not what its manifest says */
  HST_NUMERICS = 7,     /* values are not finite */
  HST_FAILED = 8,       /* a graph could not be loaded or run */
  HST_CANCELLED = 130   /* a callback said to stop */
};

/* -- versions and errors ------------------------------------------------------------------------------------------------ */

/* The version of the library that is loaded: HST_API_VERSION of its own header. Any thread. */
HST_API uint32_t hst_api_version(void);

/* One of the codes above; 0 for NULL, HST_REQUEST for an error that was freed. Any thread. */
HST_API int32_t hst_error_code(const hst_error *error);

/* What was asked, what was found, what to do: one or more lines. Lives as long as the error; "" for NULL. Any thread. */
HST_API const char *hst_error_message(const hst_error *error);

/* Frees an error; NULL is fine. */
HST_API void hst_error_free(hst_error *error);

/* -- bundles ------------------------------------------------------------------------------------------------------------ */

/* Opens the folder NAME.hstb and checks all of it: manifest, paths, the hash of every file that a run reads, whether it can run here.
 * *bundle is the caller's, to be freed with hst_bundle_free. Fails with HST_MISSING, HST_INTEGRITY or HST_INCOMPATIBLE. */
HST_API hst_error *hst_bundle_open(const char *path, hst_bundle **bundle);

/* Told while a bundle is opened how many bytes were checked, and how many there are: one call at a time, from any of the threads that
 * hash. 0 goes on, anything else cancels. */
typedef int32_t (*hst_hash_progress)(void *context, uint64_t done, uint64_t total);

typedef struct hst_open_params { /* since 1.1 */
  uint32_t struct_size;          /* by hst_open_params_init; not to be changed */
  uint32_t api_version;          /* the same */
  hst_hash_progress on_hash;     /* or NULL */
  void *on_hash_context;
} hst_open_params;

/* Fills in the defaults; use HST_OPEN_PARAMS_INIT. Fails as hst_request_init. */
HST_API hst_error *hst_open_params_init(hst_open_params *params, uint32_t struct_size, uint32_t api_version);
#define HST_OPEN_PARAMS_INIT(params) hst_open_params_init((params), (uint32_t)sizeof(hst_open_params), HST_API_VERSION)

/* hst_bundle_open with parameters, which may be NULL. Fails with HST_CANCELLED, too. Since 1.1. */
HST_API hst_error *hst_bundle_open_with(const char *path, const hst_open_params *params, hst_bundle **bundle);

/* Frees a bundle; NULL is fine. */
HST_API void hst_bundle_free(hst_bundle *bundle);

/* The name in the manifest. Lives as long as the bundle. */
HST_API const char *hst_bundle_name(const hst_bundle *bundle);

/* What the content is known by, 64 hex digits. Lives as long as the bundle. */
HST_API const char *hst_bundle_fingerprint(const hst_bundle *bundle);

/* How many text encoders, and so tokenizers, there are. */
HST_API size_t hst_bundle_tokenizers(const hst_bundle *bundle);

/* The tokens of a text as the encoder `index` is fed them: cut and padded to its length.
 * Writes at most `capacity` ids to `ids` and their whole number to *count, which may be more; `ids` may be NULL if `capacity` is 0.
 * *needed, if not NULL, is how many the text has uncut: more than *count means that its end was cut off. */
HST_API hst_error *hst_bundle_tokenize(const hst_bundle *bundle, size_t index, const char *text, int64_t *ids, size_t capacity,
                                       size_t *count, size_t *needed);

/* -- requests ----------------------------------------------------------------------------------------------------------- */

/* Called after each of `steps` steps, on the thread that generates, with the number of steps done. 0 goes on, anything else cancels:
 * the call then fails with HST_CANCELLED and the pipeline stays usable. It must not use the pipeline that called it. */
typedef int32_t (*hst_progress)(void *context, int32_t done, int32_t steps);

/* What a step does, or did. */
enum { HST_STAGE_LARGE = 0, HST_STAGE_HYBRID = 1, HST_STAGE_SMALL = 2 };
typedef struct hst_step {
  int32_t stage;        /* one of the above */
  int32_t large_tokens; /* image tokens that the large model computes; -1: a threshold decides when it runs */
  int32_t small;        /* whether the small model runs */
  int32_t redraw;       /* whether the mask of the next step is drawn */
  double seconds;       /* that it took; 0 in a plan; in a step callback not a number where the host would have to wait for the GPU */
} hst_step;

/* What a step callback is told. Later versions add fields at the end. */
typedef struct hst_step_event {
  uint32_t struct_size; /* of the library's */
  int32_t step, steps;  /* its index, from 0, and how many the plan has */
  double timestep;      /* that the models were fed, about 1000 to 0 */
  hst_step done;        /* what the step did */
  hst_loop *loop;       /* for the two functions below, until the callback returns */
  size_t latent_count;  /* how many latents there are, of all images */
} hst_step_event;

/* Called after each step, on the thread that generates; must not use the pipeline that called it. 0 goes on; HST_STOP ends the loop here
 * and makes the result of what there is; anything else cancels, as `hst_progress` does. Since 1.1. */
enum { HST_GO_ON = 0, HST_CANCEL = 1, HST_STOP = 2 };
typedef int32_t (*hst_step_end)(void *context, const hst_step_event *event);

/* Copies the latents after the step, [images, C, H/8, W/8], to `latents`; `count` is how many there are, and is checked.
 * Only within the callback that was given `loop`. Since 1.1. */
HST_API hst_error *hst_loop_latents(const hst_loop *loop, float *latents, size_t count);

/* Replaces them; the next step goes on from these. The same rules. Since 1.1. */
HST_API hst_error *hst_loop_set_latents(hst_loop *loop, const float *latents, size_t count);

enum { HST_OUTPUT_RGB = 1, HST_OUTPUT_LATENTS = 2 };

/* A request. Set up by hst_request_init, then change what you like; the library keeps nothing of it. */
typedef struct hst_request {
  uint32_t struct_size; /* by hst_request_init; not to be changed */
  uint32_t api_version; /* the same */

  const char *const *prompts; /* one or more, drawn in one batch */
  size_t prompt_count;
  const char *const *negative_prompts; /* none, one for all prompts, or one for each */
  size_t negative_prompt_count;
  int32_t images_per_prompt; /* 1 */

  int32_t height, width;       /* pixels; 0: the bundle's default */
  int32_t num_inference_steps; /* 0: the bundle's default */
  double guidance_scale;       /* 0 to 100, on above 1; negative: the bundle's default */

  const uint64_t *seeds; /* one for the whole request, one for each image, or none: a random one */
  size_t seed_count;
  const float *latents; /* start noise [images, C, H/8, W/8] instead of seeds, see hst_bundle_latent_shape; or NULL */
  size_t latent_count;

  const char *schedule;         /* "hybrid", "large", "small", "t-stitch", "srdiffusion", "ras" */
  const char *solver;           /* "euler", "ab2", "dpmpp-2m" */
  const char *timestep_spacing; /* "linspace", "trailing" */
  double shift;                 /* of sigmas, above 0; 0: the pair's own */
  int32_t has_stages;           /* whether `stages` are given; 0: the schedule's default */
  int32_t stages[3];            /* large, hybrid and small steps */
  int32_t refresh_every;        /* every so manyth masked step is a full large call; 0: none; -1: the schedule's default */
  double correction;            /* 0 to 1; 0 is off */
  int32_t adaptive;             /* whether the large stage ends by SRDiffusion's rule */

  double mask_ratio;      /* 0.3; in (0, 1] */
  double mask_threshold;  /* times the median score, instead of the ratio; 0: none */
  double mask_decay;      /* 0.9 */
  double mask_drift;      /* 0 */
  double mask_starvation; /* 0 */
  int32_t keep_masks;     /* whether hst_result_mask gives the masks */

  hst_progress progress; /* or NULL */
  void *progress_context;

  /* Since 1.1. */
  int32_t outputs;       /* HST_OUTPUT_RGB, HST_OUTPUT_LATENTS or the sum of both; without RGB the VAE decoder does not run. RGB */
  int32_t has_mask_seed; /* a control: every mask is drawn at random from `mask_seed`, whatever the scores; 0 */
  uint64_t mask_seed;
  hst_step_end on_step_end; /* or NULL; called after `progress` */
  void *on_step_end_context;
} hst_request;

/* Fills in the defaults; use HST_REQUEST_INIT. Fails with HST_INCOMPATIBLE if the host was compiled for another major version, or
 * for a newer minor one, than this library's. */
HST_API hst_error *hst_request_init(hst_request *request, uint32_t struct_size, uint32_t api_version);
#define HST_REQUEST_INIT(request) hst_request_init((request), (uint32_t)sizeof(hst_request), HST_API_VERSION)

/* The plan of a request, before anything runs: writes at most `capacity` steps, and their whole number to *count. */
HST_API hst_error *hst_bundle_plan(const hst_bundle *bundle, const hst_request *request, hst_step *steps, size_t capacity,
                                   size_t *count);

/* The shape of a request's latents, [images, C, H/8, W/8]. Since 1.1. */
HST_API hst_error *hst_bundle_latent_shape(const hst_bundle *bundle, const hst_request *request, int64_t shape[4]);

/* -- pipelines ---------------------------------------------------------------------------------------------------------- */

typedef struct hst_pipeline_params {
  uint32_t struct_size; /* by hst_pipeline_params_init; not to be changed */
  uint32_t api_version; /* the same */
  int32_t threads;      /* of a call on the CPU, at most 256; 0: one for each physical core */
  int32_t device;       /* which GPU, for bundles of engines; 0 */
  int32_t low_memory;   /* whether graphs are freed as soon as a request no longer needs them, and loaded for each anew; 0 */
  /* The shared library of ONNX Runtime; NULL: the environment's HST_ONNXRUNTIME, else libonnxruntime.so where the system looks. */
  const char *onnxruntime;
} hst_pipeline_params;

/* Fills in the defaults; use HST_PIPELINE_PARAMS_INIT. Fails as hst_request_init. */
HST_API hst_error *hst_pipeline_params_init(hst_pipeline_params *params, uint32_t struct_size, uint32_t api_version);
#define HST_PIPELINE_PARAMS_INIT(params) \
  hst_pipeline_params_init((params), (uint32_t)sizeof(hst_pipeline_params), HST_API_VERSION)

/* Makes a pipeline; graphs are loaded when they are first used. `params` may be NULL. *pipeline is the caller's, to be freed with
 * hst_pipeline_free. The first one in a process opens ONNX Runtime, which stays open, with its telemetry off (it sets
 * ORT_DISABLE_TELEMETRY unless the environment has it). For a bundle of engines it opens the NVIDIA driver's library and TensorRT's
 * instead: the one that the environment's HST_TENSORRT names, else libnvinfer or libtensorrt_rtx where the system looks.
 * Fails with HST_MISSING or HST_INCOMPATIBLE if that cannot be. */
HST_API hst_error *hst_pipeline_create(const hst_bundle *bundle, const hst_pipeline_params *params, hst_pipeline **pipeline);

/* Frees a pipeline; NULL is fine. Its results stay. While it draws, in another thread or in the callback that asks, it lives until that
 * run has ended. */
HST_API void hst_pipeline_free(hst_pipeline *pipeline);

/* Draws. *result is the caller's, to be freed with hst_result_free. After a failure, a cancelled run too, the pipeline can be used
 * again. Blocks until done. A second call while it draws fails with HST_REQUEST. */
HST_API hst_error *hst_generate(hst_pipeline *pipeline, const hst_request *request, hst_result **result);

/* -- results: plain memory, readable by any number of threads at once --------------------------------------------------------- */

HST_API void hst_result_free(hst_result *result); /* NULL is fine */
HST_API size_t hst_result_images(const hst_result *result);
HST_API int32_t hst_result_height(const hst_result *result);
HST_API int32_t hst_result_width(const hst_result *result);

/* Pixels [height, width, 3] of an image, 8 bits each: red, green, blue. Lives as long as the result; NULL past the last image, and without
 * HST_OUTPUT_RGB. */
HST_API const uint8_t *hst_result_rgb(const hst_result *result, size_t image);

/* The denoised latents [images, C, H/8, W/8], and their shape to `shape`, if not NULL. Live as long as the result; NULL without
 * HST_OUTPUT_LATENTS. Since 1.1. */
HST_API const float *hst_result_latents(const hst_result *result, int64_t shape[4]);

/* The seeds that were used: as many as hst_result_seed_count. Lives as long as the result. */
HST_API size_t hst_result_seed_count(const hst_result *result);
HST_API const uint64_t *hst_result_seeds(const hst_result *result);

HST_API size_t hst_result_steps(const hst_result *result);

/* What step number `step` did. Fails with HST_REQUEST past the last one. */
HST_API hst_error *hst_result_step(const hst_result *result, size_t step, hst_step *record);

/* The mask of a step, [images, height, width] tokens, 1 where the large model worked; *height and *width, if not NULL, get its size.
 * Lives as long as the result; NULL for a step without a mask, or where masks were not kept. */
HST_API const uint8_t *hst_result_mask(const hst_result *result, size_t step, int32_t *height, int32_t *width);

/* Seconds that the parts of the run took. */
typedef struct hst_times {
  double text, denoise, vae;
} hst_times;
HST_API hst_times hst_result_times(const hst_result *result);

/* One stage's share of a run. Tokens are image tokens of one image that the large model computed. */
typedef struct hst_stage_stats {
  int64_t steps, large_calls, large_tokens, small_calls;
  double seconds;
} hst_stage_stats;

/* What a run computed, and what that saved. Costs are in full large calls. */
typedef struct hst_stats {
  int64_t num_tokens;         /* image tokens of an image */
  int64_t large_tokens;       /* of one image, of all steps */
  hst_stage_stats stages[3];  /* by HST_STAGE_LARGE ... */
  double large_compute;       /* cost of all large calls */
  double large_compute_saved; /* share of what as many large-only steps would have cost the large model */
  double cost;                /* of all calls of both models, and the glue of steps with a mask */
  double modelled_speedup;    /* of the loop, over as many large-only steps, by these costs */
  double overhead;            /* share of the loop's time outside the two models; not a number where engines were not timed */
} hst_stats;

/* Use HST_RESULT_STATS. struct_size: of the host's hst_stats. Fails with HST_INCOMPATIBLE if that is none of this library's. Since 1.1. */
HST_API hst_error *hst_result_stats(const hst_result *result, hst_stats *stats, uint32_t struct_size);
#define HST_RESULT_STATS(result, stats) hst_result_stats((result), (stats), (uint32_t)sizeof(hst_stats))

/* What the costs were taken from, in words: a measurement that the bundle holds, or the cost model. Lives as long as the result. Since 1.1. */
HST_API const char *hst_result_cost_source(const hst_result *result);

/* Seconds inside each engine, from the first step to the check that the last latents are finite: how many engines, and the name of one.
 * None where steps are replayed as one graph each. Names live as long as the result; NULL past the last. `seconds` may be NULL. Since 1.1. */
HST_API size_t hst_result_engines(const hst_result *result);
HST_API const char *hst_result_engine(const hst_result *result, size_t index, double *seconds);

/* What the caller may want to tell people, such as that a prompt was too long, or that a CUDA graph could not be captured, which makes
 * runs slower: how many warnings, and one. They live as long as the result; NULL past the last. Since 1.1. */
HST_API size_t hst_result_warnings(const hst_result *result);
HST_API const char *hst_result_warning(const hst_result *result, size_t index);

#ifdef __cplusplus
}
#endif
#endif
