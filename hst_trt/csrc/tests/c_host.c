/* A host in C: the header is C99, the library links, and another major version is refused. */
#include <stdio.h>

#include "hst_trt.h"

int main(void) {
  hst_request request;
  hst_error *error = hst_request_init(&request, (uint32_t)sizeof request, HST_API_VERSION + 65536);
  const int32_t code = hst_error_code(error);
  printf("%s\n", hst_error_message(error));
  hst_error_free(error);
  if (code != HST_INCOMPATIBLE || hst_api_version() != HST_API_VERSION) return 1;
  error = HST_REQUEST_INIT(&request);
  if (error != NULL || request.images_per_prompt != 1) return 1;
  hst_bundle_free(NULL);
  hst_pipeline_free(NULL);
  hst_result_free(NULL);
  hst_error_free(NULL);
  return 0;
}
