// Khronos validator on one or several .glb files: prints the counts and every message; exit code 1 on errors or warnings.
//
//     npm install gltf-validator
//     node benchmarks/gltf_validate.mjs OUT/mesh.glb
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

// npm's packages lie where the command is run, not beside this file
const validator = createRequire(`${process.cwd()}/`)("gltf-validator");
let bad = 0;
for (const path of process.argv.slice(2)) {
  const { issues } = await validator.validateBytes(new Uint8Array(readFileSync(path)));
  console.log(`${path}: ${issues.numErrors} errors, ${issues.numWarnings} warnings, ${issues.numInfos} infos, ${issues.numHints} hints`);
  for (const m of issues.messages) console.log(`  ${["error", "warning", "info", "hint"][m.severity]} ${m.code} ${m.pointer}: ${m.message}`);
  bad += issues.numErrors + issues.numWarnings;
}
process.exit(bad ? 1 : 0);
