#!/usr/bin/env bash
# Crée l’environnement virtuel et y pose le cours, aux versions exactes de requirements.txt et constraints.txt.
#
#     tools/install.sh PYTHON DOSSIER
#
# Le témoin DOSSIER/.complet n’est écrit qu’à la fin. Un empêchement se dit en une ligne ; le reste est dans le
# journal DOSSIER/installation.log.
set -u

python=$1
venv=$2
log=$venv/installation.log
pending=$venv/.inacheve  # présent tant que des fichiers de paquets peuvent être à moitié écrits
required=4               # Go : 2,6 mesurés avec le navigateur des essais, le reste pour les archives pendant la pose

fail() {
    printf '%s\n' "$1" >&2
    exit 1
}

check_python() {
    local version
    command -v "$python" >/dev/null ||
        fail "Python est introuvable (« ${python} ») : installez Python 3.11 ou plus récent, ou indiquez-le par « make PYTHON=/chemin/vers/python3 html »."
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
    [[ ${version} =~ ^([0-9]+)\.([0-9]+)$ ]] && ((BASH_REMATCH[1] * 100 + BASH_REMATCH[2] >= 311)) ||
        fail "Python ${version:-inconnu} est trop ancien (« ${python} ») : il faut Python 3.11 ou plus récent ; indiquez-le par « make PYTHON=/chemin/vers/python3 html »."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Ce Python n’a pas le module venv (« ${python} ») : installez-le (sous Debian et Ubuntu, le paquet python${version}-venv), puis relancez."
}

check_disk() {
    local free
    free=$(df -Pk . | awk 'NR == 2 { print $4 }')
    ((free >= required * 1024 * 1024)) ||
        fail "Place insuffisante sur le disque : il reste $((free / 1024)) Mo et il en faut $((required * 1024)) ; libérez-en, puis relancez."
}

# Traduit l’échec de pip, lu dans son journal.
explain() {
    if grep -qiE 'no space left|errno 28|disk quota' "$log"; then
        fail "Le disque est plein : libérez de la place, puis relancez ; l’installation reprendra."
    elif grep -qiE 'Retrying \(|connection (error|failed|refused|reset|broken|aborted)|timed out|name resolution|unreachable' "$log"; then
        rm -f "$pending" # pip va tout chercher avant de poser quoi que ce soit
        fail "Le réseau ne répond pas : vérifiez la connexion (ou le proxy), puis relancez ; l’installation reprendra."
    fi
    fail "L’installation a échoué : $(grep -m1 '^ERROR' "$log" || tail -n 1 "$log") (journal : ${log})"
}

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" 2>&1 | tee -a "$log" |
        awk '/^ *Downloading .* MB\)/ && substr($3, 2) + 0 >= 5 { print "  " $2, $3, $4; fflush() }'
    ((PIPESTATUS[0] == 0)) || explain
}

usable() { # un Python assez récent, avec pip, et qu’aucune interruption n’a laissé à moitié garni
    [[ ! -e $pending ]] && "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! usable; then
    check_python
    rm -rf "$venv"
    check_disk
    echo "Création de l’environnement ${venv}…"
    "$python" -m venv "$venv" >/dev/null 2>&1 ||
        fail "L’environnement ${venv} ne peut pas être créé : vérifiez les droits du dossier et la place sur le disque."
fi
{ touch "$pending" && >"$log"; } 2>/dev/null || fail "Le dossier ${venv} n’est pas accessible en écriture."
echo "Installation des bibliothèques (quelques minutes la première fois)…"
install -r requirements.txt -c constraints.txt
install --no-deps --no-build-isolation -e .
rm -f "$pending"
touch "$venv/.complet"
