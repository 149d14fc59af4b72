// cpp_host BUNDLE PROMPT: draws a picture and writes it as PPM to standard output.
#include <hst_trt.hpp>
#include <iostream>

int main(int count, char **arguments) {
  if (count != 3) {
    std::cerr << "Usage: cpp_host BUNDLE PROMPT > OUT.ppm\n";
    return HST_REQUEST;
  }
  try {
    const hst::Bundle bundle(arguments[1]);
    const hst::Pipeline pipeline(bundle);
    hst::Request request({arguments[2]});
    request.seeds({7});
    const hst::Result result = pipeline(request);
    std::cout << "P6\n" << result.width() << " " << result.height() << "\n255\n";
    std::cout.write(reinterpret_cast<const char *>(result.rgb(0)), std::streamsize{3} * result.width() * result.height());
    return std::cout.flush() ? 0 : HST_RESOURCE;
  } catch (const hst::Error &error) {
    std::cerr << error.what() << "\n";
    return error.code();
  }
}
